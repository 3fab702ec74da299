"""Loads an exported folder as a stranger would and sends its logits: a script for a process of its own.

    python -P fresh_load.py FOLDER REQUEST.json

Only torch and transformers can be imported; this package cannot. REQUEST holds `threads`, `texts`, and `samples`: lists
of token ids. Standard output carries one JSON line with what loading reported, one with the texts' tokens, then per
sample one with the shape [T, V] and as many float32 values.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO


def main(folder: str, request: dict[str, Any], out: BinaryIO) -> None:
    """Load `folder` in float32 and write to `out` as described above."""
    sys.modules["loopmem_pretrain"] = None  # type: ignore[assignment]  # importing it now fails
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def send(value: object) -> None:
        out.write(json.dumps(value).encode() + b"\n")

    send({key: sorted(map(str, value)) for key, value in info.items() if value})
    send([tokenizer(text)["input_ids"] for text in request["texts"]])
    with torch.inference_mode():
        for ids in request["samples"]:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            send(list(logits.shape))
            out.write(logits.contiguous().numpy().tobytes())


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as stream:
        os.dup2(2, 1)  # whatever a library prints is no data
        main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), stream)
