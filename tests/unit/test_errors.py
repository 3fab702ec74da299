"""Named errors: exit codes, what they print, and that they cross process borders whole."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from loopmem_pretrain import errors
from loopmem_pretrain.errors import LoopMemError

CODES = {
    "ConfigError": 2,
    "OutOfMemory": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "ConversionError": 5,
    "EnvironmentFault": 6,
    "TrainingGaveUp": 7,
    "HangDetected": 8,
}


def named_errors() -> dict[str, type[LoopMemError]]:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LoopMemError)]
    return {kind.__name__: kind for kind in kinds if kind is not LoopMemError}


def test_every_error_has_its_code():
    assert {name: kind.exit_code for name, kind in named_errors().items()} == CODES


def test_the_module_says_its_codes():
    for code in (errors.EXIT_DONE, errors.EXIT_BUG, *CODES.values()):
        assert f" {code} " in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", named_errors().values())
def test_text_is_problem_and_what_to_do(kind):
    error = kind("a problem", "a fix")
    assert (error.problem, error.fix) == ("a problem", "a fix")
    assert str(error) == "a problem\n  what to do: a fix"


def test_without_a_fix_there_is_no_empty_line():
    assert str(LoopMemError("a problem")) == "a problem"


@pytest.mark.parametrize("kind", named_errors().values())
def test_pickling_keeps_kind_problem_and_fix(kind):
    error = pickle.loads(pickle.dumps(kind("a problem", "a fix")))
    assert type(error) is kind
    assert (error.problem, error.fix, error.exit_code) == ("a problem", "a fix", kind.exit_code)


def fail() -> None:
    raise errors.DataError("shard 3 is short", "prepare it again")


def test_an_error_of_a_worker_process_arrives_with_its_fix():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(errors.DataError) as caught:
        pool.submit(fail).result()
    assert caught.value.fix == "prepare it again"
