"""Compares an exported folder, loaded afresh in a process of its own, with the checkpoint it was made from.

Both compute at the same time, the exported model in its process and the reference here, and every value that the
exported one sends is compared as it comes: gates, states and halting probabilities of each layer and loop, then logits.
Nothing is kept, and both models' weights stay mapped from the disk (hf/fresh_load.py), so neither is whole in memory.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmem_pretrain.errors import ConversionError, EnvironmentFault
from loopmem_pretrain.hf import fresh_load
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM

RELATIVE_TOLERANCE = 1e-5
PROMPT_TOKENS, NEW_TOKENS = 32, 16
_REPORT = "nothing was exported; report this together with the model's config"


class Comparison(NamedTuple):
    """How close the exported model is; float32 on the CPU."""

    texts: int
    """Texts compared."""
    tokens: int
    """Tokens of all texts: so many rows of logits."""
    places: int
    """Tensors compared: gates, states, halting probabilities and logits of all texts."""
    max_abs_difference: float
    """Largest |exported - reference| of any logit."""
    scale: float
    """Largest |reference logit|."""
    tolerance: float
    """What the difference of logits may be: 1e-5 * max(1, scale)."""
    reference_loss: float
    """Mean next-token cross-entropy of the texts in nats, by the reference."""
    exported_loss: float
    """The same from the exported folder; may differ by the tolerance too."""
    greedy_tokens: int
    """Tokens that `generate` continued a text by, each the reference's best."""
    expected_loops: tuple[float, ...]
    """Mean over the tokens, for each layer that loops."""


def reference_model(config: Any, weights: Mapping[str, Tensor]) -> LoopMemLM:
    """The model of `model/loopmem.py` over exactly these tensors, without a copy of them."""
    with torch.device("meta"):
        model = LoopMemLM(config, TorchBackend())
    state = dict(weights)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def rounding(dtype: torch.dtype) -> fresh_load.Convert:
    """Weights as a folder of that type holds them, float32 again."""
    return lambda name, value: value.to(dtype).float()


def verify_folder(
    folder: Path,
    config: Any,
    weights: Mapping[str, Tensor],
    texts: list[str],
    tokens: list[list[int]],
    seq_length: int,
    stored: fresh_load.Convert | None = None,
    num_loops: int | None = None,
) -> Comparison:
    """Load `folder` with transformers in a fresh process and compare what it computes, all in float32.

    Args:
        folder: exported folder.
        config: the model's sizes.
        weights: public name -> float32 tensor, what the folder should hold.
        texts: real text.
        tokens: its token ids, each text at least one long and one of them at least two.
        seq_length: the models are compared on so many tokens of each text at most.
        stored: name and value of a weight -> the value that the folder holds; None where it holds them as they are.
        num_loops: None for a folder that loops as the checkpoint does. Where it holds a model of layers that do not
            loop, how often the reference applies each layer; then its layers' outputs are compared, not its loops.

    Raises:
        ConversionError: it does not load, loading reports keys, or tokens, a value of some layer and loop, logits, loss
            or greedy text differ; with the first place that differs, and the numbers.
        EnvironmentFault: the process that loads it was killed.
    """
    reference = reference_model(config, weights)
    if stored is not None:
        fresh_load.convert_by_parts(reference, stored)
    samples = [ids[:seq_length] for ids in tokens]
    prompt = max(samples, key=len)[: min(PROMPT_TOKENS, seq_length - 1)]  # leaves room in the context
    request = {
        "texts": texts,
        "samples": samples,
        "prompt": prompt,
        "new_tokens": NEW_TOKENS,
        "layers_only": num_loops is not None,
    }
    with _fresh_process(folder, request) as stream:
        _check_loading(stream, tokens)
        continuation = json.loads(_line(stream))
        with torch.inference_mode():
            output = reference(torch.tensor([prompt + continuation]), num_loops=num_loops)
        comparison = _Comparing(stream, reference, num_loops).run(samples)
    _check_greedy(output.logits[0, len(prompt) - 1 : -1], continuation, comparison.tolerance)
    return comparison._replace(greedy_tokens=len(continuation))


@contextmanager
def _fresh_process(folder: Path, request: dict[str, Any]) -> Iterator[IO[bytes]]:
    """What fresh_load.py sends; an EOFError of the block becomes the reason why that process ended."""
    with tempfile.TemporaryDirectory(prefix="loopmem-verify-") as name:
        work = Path(name)
        content = {"threads": torch.get_num_threads(), **request}
        (work / "request.json").write_text(json.dumps(content), encoding="utf-8")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-P", fresh_load.__file__, str(folder), str(work / "request.json")]
        with (
            (work / "stderr").open("wb") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment
            ) as process,
        ):
            assert process.stdout is not None
            try:
                yield process.stdout
            except EOFError:
                process.wait()
                tail = (work / "stderr").read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                raise _broken_off(process.returncode, tail) from None
            finally:
                process.kill()  # has ended by itself unless something above failed


def _check_loading(stream: IO[bytes], tokens: list[list[int]]) -> None:
    report = json.loads(_line(stream))
    if report:
        raise ConversionError(f"loading the exported folder reports {report}", _REPORT)
    exported = json.loads(_line(stream))
    differing = [number for number, ids in enumerate(tokens) if exported[number] != ids]
    if differing:
        raise ConversionError(
            f"the exported tokenizer gives other tokens for sample texts {differing} of {len(tokens)}: the first has "
            f"{len(exported[differing[0]])} instead of {len(tokens[differing[0]])}, or others",
            _REPORT,
        )


class _Comparing:
    """Runs the reference and compares each value with the one that the exported model sends."""

    def __init__(self, stream: IO[bytes], reference: LoopMemLM, num_loops: int | None) -> None:
        self.stream, self.reference, self.num_loops = stream, reference, num_loops
        self.text = self.places = 0

    def run(self, samples: list[list[int]]) -> Comparison:
        difference = scale = 0.0
        losses, predictions = [0.0, 0.0], 0
        loops: list[Tensor] = []
        (fresh_load.watch if self.num_loops is None else fresh_load.watch_layers)(self.reference, self.compare)
        for self.text, ids in enumerate(samples):
            with torch.inference_mode():
                output = self.reference(torch.tensor([ids]), num_loops=self.num_loops)
            exported = self.compare("logits", output.logits)
            difference = max(difference, float((exported - output.logits).abs().max()))
            scale = max(scale, float(output.logits.abs().max()))
            targets = torch.tensor(ids[1:])
            for index, logits in enumerate((output.logits[0], exported[0])):
                losses[index] += float(F.cross_entropy(logits[:-1].double(), targets, reduction="sum"))
            predictions += len(targets)
            loops.append(torch.tensor([float(layer.expected_loops().sum()) for layer in output.stats]))
        tokens = sum(len(ids) for ids in samples)
        means = [total / predictions for total in losses]
        tolerance = RELATIVE_TOLERANCE * max(1.0, scale)
        if abs(means[0] - means[1]) > tolerance:
            raise ConversionError(
                f"the exported model computes something else: its loss over {tokens} tokens is {means[1]:.6f} instead "
                f"of {means[0]:.6f}; they may differ by {tolerance:.3e}",
                _REPORT,
            )
        return Comparison(
            texts=len(samples),
            tokens=tokens,
            places=self.places,
            max_abs_difference=difference,
            scale=scale,
            tolerance=tolerance,
            reference_loss=means[0],
            exported_loss=means[1],
            greedy_tokens=0,
            expected_loops=tuple((torch.stack(loops).sum(0) / tokens).tolist()),
        )

    def compare(self, place: str, expected: Tensor) -> Tensor:
        """The exported model's values of the same place."""
        where = f"{place} (sample text {self.text})"
        if not bool(torch.isfinite(expected).all()):
            raise ConversionError(
                f"the model itself computes values that are not finite: {where}",
                "export a checkpoint of a healthy model",
            )
        sent, shape = json.loads(_line(self.stream))
        if sent != place or shape != list(expected.shape):
            raise ConversionError(
                f"the exported model computes {sent} {shape} where {where} {list(expected.shape)} was expected", _REPORT
            )
        content = bytearray(_bytes(self.stream, 4 * expected.numel()))
        exported = torch.frombuffer(content, dtype=torch.float32).view(shape)
        scale = float(expected.abs().max())
        difference, allowed = float((exported - expected).abs().max()), RELATIVE_TOLERANCE * max(1.0, scale)
        if not difference <= allowed:  # nor NaN
            raise ConversionError(
                f"the exported model computes something else, first in {where}: values differ by up to "
                f"{difference:.3e} (largest reference value {scale:.3e}); allowed is {allowed:.3e}",
                _REPORT,
            )
        self.places += 1
        return exported


def _check_greedy(logits: Tensor, continuation: list[int], tolerance: float) -> None:
    """Each token the exported model chose has the best of the reference's logits [tokens, V], ties aside."""
    chosen = logits.gather(-1, torch.tensor(continuation)[:, None])[:, 0]
    behind = logits.max(dim=-1).values - chosen
    wrong = (behind > 2 * tolerance).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ConversionError(
            f"the exported model's greedy text differs at its token {first}, computed with the key/value cache: "
            f"{continuation[first]} instead of {int(logits[first].argmax())}, whose logit is "
            f"{float(behind[first]):.3e} larger; allowed is {2 * tolerance:.3e}",
            _REPORT,
        )


def _line(stream: IO[bytes]) -> bytes:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _bytes(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def _broken_off(code: int, stderr: str) -> ConversionError | EnvironmentFault:
    if code < 0:
        return EnvironmentFault(
            f"the process that loads the exported folder was ended by signal {signal.Signals(-code).name}",
            "if memory ran out, export where there is more: docs/huggingface.md says what it takes",
        )
    return ConversionError(f"the exported folder does not load (exit code {code}):\n{stderr}", _REPORT)
