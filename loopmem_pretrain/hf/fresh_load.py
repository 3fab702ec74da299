"""Loads an exported folder as a stranger would and sends what it computes: a script for a process of its own.

    python -P fresh_load.py FOLDER REQUEST.json

Only torch and transformers can be imported; this package cannot. REQUEST holds `threads`, `texts`, `prompt` (token
ids), `new_tokens`, `layers_only`, and `samples`: lists of token ids. Standard output carries one JSON line with what
loading reported, one with the texts' tokens, one with the greedy continuation of the prompt, then for each sample what
`watch` (or `watch_layers`) tells and the logits: one JSON line with the name and the shape, then the float32 values.

The weights stay mapped from the folder. A bfloat16 model computes in float32, on weights that are widened one part at
a time: no whole model is ever in memory.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

Tell = Callable[[str, Tensor], object]
Convert = Callable[[str, Tensor], Tensor]


def convert_by_parts(model: Any, convert: Convert) -> None:
    """Let `model` compute on converted weights, which exist for one part of it at a time.

    Parts are the embedding, each layer, and the head. The small rest is converted for good, with it the global bank,
    which all layers read.

    Args:
        model: LoopMemLM or LoopMemForCausalLM, for inference.
        convert: name and old value of a parameter -> new value.
    """
    parts = [model.model.embed_tokens, *model.model.layers, model.lm_head]
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_parts = {parameter for part in parts for parameter in part.parameters()}
    for parameter, name in names.items():
        if parameter not in by_parts:
            parameter.data = convert(name, parameter.data)
    for part in parts:
        _convert_while_it_runs(part, names, convert)


def _convert_while_it_runs(part: nn.Module, names: dict[nn.Parameter, str], convert: Convert) -> None:
    kept: list[Tensor] = []

    def before(module: nn.Module, arguments: object) -> None:
        for parameter in module.parameters():
            kept.append(parameter.data)
            parameter.data = convert(names[parameter], parameter.data)

    def after(module: nn.Module, arguments: object, result: object) -> None:
        for parameter, value in zip(module.parameters(), kept, strict=True):
            parameter.data = value
        kept.clear()

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


def watch(model: Any, tell: Tell) -> None:
    """Have `tell` called with what each loop of each layer computes, while it does: gates, state and halting.

    Args:
        model: LoopMemLM or LoopMemForCausalLM.
        tell: is given the place in words, and the values.
    """
    for index, layer in enumerate(model.model.layers):
        _watch_layer(layer, f"layer {index}", tell)


def watch_layers(model: Any, tell: Tell) -> None:
    """The same for the output of each layer alone, of any decoder of transformers too."""
    for index, layer in enumerate(model.model.layers):
        _watch_output(layer, f"hidden state of layer {index}", tell)


def _watch_output(layer: nn.Module, name: str, tell: Tell) -> None:
    def after(module: nn.Module, arguments: object, result: Any) -> None:
        tell(name, result if isinstance(result, Tensor) else result[0])

    layer.register_forward_hook(after)


def _watch_layer(layer: Any, name: str, tell: Tell) -> None:
    loop = 0
    run = layer.run or layer.one_loop

    def start(module: nn.Module, arguments: object) -> None:
        nonlocal loop
        loop = 0

    def watched_run(*arguments: Any) -> Any:
        nonlocal loop
        loop += 1
        result = run(*arguments)
        if isinstance(result, Tensor):  # a plain layer
            tell(f"hidden state of {name}", result)
        else:
            state, report = result
            tell(f"hidden state of {name}, loop {loop}", state.hidden)
            tell(f"halting probability of {name}, loop {loop}", report.halting_prob)
        return result

    def gates(module: nn.Module, arguments: object, result: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        for bank, gate in zip(("local", "global"), result[1:], strict=True):
            if gate is not None:
                tell(f"{bank} gate of {name}, loop {loop}", gate)

    layer.register_forward_pre_hook(start)
    layer.run = watched_run
    if getattr(layer, "memory", None) is not None:
        layer.memory.register_forward_hook(gates)


def widen(name: str, value: Tensor) -> Tensor:
    """float32, without a copy of what is float32."""
    return value.float()


def main(folder: str, request: dict[str, Any], out: BinaryIO) -> None:
    """Load `folder` and write to `out` as described above."""
    sys.modules["loopmem_pretrain"] = None  # type: ignore[assignment]  # importing it now fails
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def send(value: object) -> None:
        out.write(json.dumps(value).encode() + b"\n")

    def tell(place: str, values: Tensor) -> None:
        send([place, list(values.shape)])
        out.write(values.contiguous().numpy().tobytes())

    send({key: sorted(map(str, value)) for key, value in info.items() if value})
    send([tokenizer(text, verbose=False)["input_ids"] for text in request["texts"]])
    if model.dtype != torch.float32:
        convert_by_parts(model, widen)
    model.generation_config.suppress_tokens = None  # rows that pad the vocabulary are compared too
    send(greedy(model, request["prompt"], request["new_tokens"]))
    (watch_layers if request["layers_only"] else watch)(model, tell)
    with torch.inference_mode():
        for ids in request["samples"]:
            tell("logits", model(input_ids=torch.tensor([ids]), use_cache=False).logits)


def greedy(model: Any, prompt: Iterable[int], new_tokens: int) -> list[int]:
    """What `generate` adds to the prompt, with its cache."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return whole[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as stream:
        os.dup2(2, 1)  # whatever a library prints is no data
        main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), stream)
