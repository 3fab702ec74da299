"""Writes generated mathematics: word problems with worked solutions, and arithmetic. Run as a program of its own.

    python -P -m loopmem_pretrain.data.demo_math UNPACKED_REASONING_GYM BYTES OUT.jsonl

It runs apart because it imports downloaded code (reasoning-gym, its hash checked before) and because the hash seed of
the interpreter must be fixed for the output to be the same every time.
"""

import importlib
import json
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 20240601
WORD_PROBLEMS = 0.6  # share of the bytes; the rest is arithmetic
PROBLEMS_PER_DOCUMENT = 8

# Packages whose __init__ would import every generator, and with them eight packages that these need not.
_HOLLOW = (
    "reasoning_gym",
    "reasoning_gym.arithmetic",
    "reasoning_gym.algebra",
    "reasoning_gym.arithmetic.gsm_symbolic",
)
_WORDS = ("arithmetic.gsm_symbolic.gsm_symbolic", "gsm_symbolic")
_ARITHMETIC = (
    ("arithmetic.basic_arithmetic", "basic_arithmetic"),
    ("arithmetic.chain_sum", "chain_sum"),
    ("arithmetic.decimal_chain_sum", "decimal_chain_sum"),
    ("arithmetic.products", "products"),
    ("arithmetic.gcd", "gcd"),
    ("arithmetic.lcm", "lcm"),
    ("arithmetic.fraction_simplification", "fraction_simplification"),
    ("arithmetic.prime_factorization", "prime_factorization"),
    ("algebra.complex_arithmetic", "complex_arithmetic"),
)
_INSTRUCTION = re.compile(  # to a chat model, the same in every problem
    r"^State the final answer to the following arithmetic problem: "
    r"|\s*Give (only |)the [a-zA-Z ]* as your final answer\.( Do not include units\.)?$"
    r"|\s*Write the factors separated by . \(Example: .*\)$"
)


def main(root: str, size: str, out: str) -> None:
    """Write about `size` bytes of JSON lines {"text": ...} to `out`."""
    for name in _HOLLOW:
        module = types.ModuleType(name)
        module.__path__ = [str(Path(root, *name.split(".")))]
        sys.modules[name] = module
    importlib.import_module("reasoning_gym.coaching")  # first: it and the factory import each other
    wanted = int(size)
    with open(out, "w", encoding="utf-8") as stream:
        for generators, share in (((_WORDS,), WORD_PROBLEMS), (_ARITHMETIC, 1 - WORD_PROBLEMS)):
            written = 0
            for text in _documents(generators):
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                stream.write(line)
                written += len(line.encode("utf-8"))
                if written >= wanted * share:
                    break


def _documents(generators: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """Pages of problems without end; no problem comes twice."""
    for module, _ in generators:
        importlib.import_module(f"reasoning_gym.{module}")
    factory: Any = importlib.import_module("reasoning_gym.factory")
    streams = [factory.create_dataset(name, size=1_000_000, seed=SEED) for _, name in generators]
    draw, seen, index = random.Random(SEED), set[str](), 0
    while True:
        page: list[str] = []
        while len(page) < PROBLEMS_PER_DOCUMENT:
            problem = draw.choice(streams)[index]
            index += 1
            text = _problem(problem)
            if text not in seen:
                seen.add(text)
                page.append(text)
        yield "\n\n".join(page) + "\n"


def _problem(problem: dict[str, Any]) -> str:
    question = _INSTRUCTION.sub("", problem["question"].strip()).strip()
    steps = (problem["metadata"].get("answer_cot") or "").split("####")[0].strip()
    if steps:
        return f"Question: {question}\nAnswer: {steps}\nThe answer is {problem['answer']}."
    return f"{question} {problem['answer']}" if question.endswith("=") else f"{question}\nAnswer: {problem['answer']}"


if __name__ == "__main__":
    main(*sys.argv[1:])
