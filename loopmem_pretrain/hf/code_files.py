"""The code that lies beside a config.json, so that transformers can load the folder without this package."""

from pathlib import Path

from loopmem_pretrain.hf.inline import inline_module

AUTO_MAP = {
    "AutoConfig": "configuration_loopmem.LoopMemConfig",
    "AutoModel": "modeling_loopmem.LoopMemModel",
    "AutoModelForCausalLM": "modeling_loopmem.LoopMemForCausalLM",
}
"""What config.json says about it."""
_HERE = Path(__file__).resolve().parent


def write_code(folder: Path) -> None:
    """Write the files that AUTO_MAP names."""
    folder.mkdir(parents=True, exist_ok=True)
    modeling = inline_module(_HERE / "modeling_loopmem.py")
    (folder / "modeling_loopmem.py").write_text(modeling, encoding="utf-8")
    configuration = inline_module(_HERE / "configuration_loopmem.py", {})
    (folder / "configuration_loopmem.py").write_text(configuration, encoding="utf-8")
