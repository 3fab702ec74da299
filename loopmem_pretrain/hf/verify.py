"""Compares an exported folder, loaded afresh in a process of its own, with the model it was made from."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmem_pretrain.errors import ConversionError, EnvironmentFault
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM

RELATIVE_TOLERANCE = 1e-5
_SCRIPT = Path(__file__).with_name("fresh_load.py")
_REPORT = "nothing was exported; report this together with the model's config"


class Comparison(NamedTuple):
    """How close the exported model is; float32 on the CPU."""

    texts: int
    """Texts compared."""
    tokens: int
    """Tokens of all texts: so many rows of logits."""
    max_abs_difference: float
    """Largest |exported - reference| of any logit."""
    scale: float
    """Largest |reference logit|."""
    tolerance: float
    """What the difference may be: 1e-5 * max(1, scale)."""
    reference_loss: float
    """Mean next-token cross-entropy of the texts in nats, model in memory."""
    exported_loss: float
    """The same from the exported folder; may differ by the tolerance too."""


def reference_model(config: Any, weights: dict[str, Tensor]) -> LoopMemLM:
    """The model of `model/loopmem.py` over exactly these tensors, without a copy of them."""
    with torch.device("meta"):
        model = LoopMemLM(config, TorchBackend())
    state = dict(weights)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def verify_folder(
    folder: Path, config: Any, weights: dict[str, Tensor], texts: list[str], tokens: list[list[int]], seq_length: int
) -> Comparison:
    """Load `folder` with transformers in a fresh process and compare its tokens, logits and loss.

    Args:
        folder: exported folder.
        config: the model's sizes.
        weights: public name -> float32 tensor, what the folder should hold.
        texts: real text.
        tokens: its token ids, each text at least one long and one of them at least two.
        seq_length: logits are compared on so many tokens of each text at most.

    Raises:
        ConversionError: it does not load, loading reports keys, or tokens, logits or loss differ; with the numbers.
        EnvironmentFault: the process that loads it was killed.
    """
    reference = reference_model(config, weights)
    samples = [ids[:seq_length] for ids in tokens]
    request = {"threads": torch.get_num_threads(), "texts": texts, "samples": samples}
    with tempfile.TemporaryDirectory(prefix="loopmem-verify-") as name:
        work = Path(name)
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-P", str(_SCRIPT), str(folder), str(work / "request.json")]
        with (
            (work / "stderr").open("wb") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment
            ) as process,
        ):
            assert process.stdout is not None
            try:
                _check_loading(process.stdout, tokens)
                return _compare(process.stdout, reference, samples)
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


def _compare(stream: IO[bytes], reference: LoopMemLM, samples: list[list[int]]) -> Comparison:
    difference = scale = 0.0
    losses, predictions = [0.0, 0.0], 0
    for number, ids in enumerate(samples):
        shape = json.loads(_line(stream))
        content = bytearray(_bytes(stream, 4 * shape[0] * shape[1]))
        exported = torch.frombuffer(content, dtype=torch.float32).view(shape)
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0]
        if not bool(torch.isfinite(expected).all()):
            raise ConversionError(
                f"the model itself computes logits that are not finite (sample text {number})",
                "export a checkpoint of a healthy model",
            )
        if exported.shape != expected.shape or not bool(torch.isfinite(exported).all()):
            raise ConversionError(
                f"sample text {number}: logits of the exported model are {list(exported.shape)} and "
                f"{int((~torch.isfinite(exported)).sum())} of them not finite; expected {list(expected.shape)}",
                _REPORT,
            )
        difference = max(difference, float((exported - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        targets = torch.tensor(ids[1:])
        for index, logits in enumerate((expected, exported)):
            losses[index] += float(F.cross_entropy(logits[:-1].double(), targets, reduction="sum"))
        predictions += len(targets)
    tokens = sum(len(ids) for ids in samples)
    tolerance = RELATIVE_TOLERANCE * max(1.0, scale)
    means = [total / predictions for total in losses]
    result = Comparison(len(samples), tokens, difference, scale, tolerance, *means)
    if difference > tolerance or abs(means[0] - means[1]) > tolerance:
        raise ConversionError(
            f"the exported model computes something else: over {tokens} tokens logits differ by up to "
            f"{difference:.3e} (largest reference logit {scale:.3e}) and the loss is {means[1]:.6f} instead of "
            f"{means[0]:.6f}; allowed is {tolerance:.3e} for both",
            _REPORT,
        )
    return result


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
            "if memory ran out, export where there is memory for two float32 copies of the model",
        )
    return ConversionError(f"the exported folder does not load (exit code {code}):\n{stderr}", _REPORT)
