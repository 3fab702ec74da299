"""A small prepared data folder, made by the real pipeline from generated sentences, once a test session."""

import json
import random
from pathlib import Path

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems

WORDS = "the of and to a in that is was he for it with as his on be at by had not but what all were when".split()  # noqa: SIM905


def prepare_sentences(folder: Path, documents: int = 600, seed: int = 1) -> Path:
    """Prepare `documents` short texts below `folder`; returns the folder of the shards."""
    from loopmem_pretrain.data.prepare import prepare

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for number in range(documents):
            words = [draw.choice(WORDS) for _ in range(draw.randint(20, 120))]
            file.write(json.dumps({"text": f"{' '.join(words)} {number}."}) + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {folder}/tokens\n"
        f"sources: [{{paths: [{folder}/text.jsonl], origin: generated, license: none}}]\n"
        f"tokenizer: {{path: {folder}/tokenizer, train: {{vocab_size: 320}}}}\n"
        "validation_fraction: 0.1\nnum_processes: 1\n",
        encoding="utf-8",
    )
    prepare(load_config(PrepareConfig, recipe, rules=prepare_problems))
    return folder / "tokens"
