"""Alarms about halting that is stuck and gates that stay shut: from which step, below which number, once."""

import logging
from types import SimpleNamespace

import pytest

from loopmem_pretrain.training.hooks import Alarms
from tests.configs import tiny_run

ALARMS = {"after_steps": 100, "min_expected_loops": 1.5, "min_gate": 0.2}


@pytest.fixture
def said(caplog):
    """said(lines of metrics, model fields) -> the warnings of one start, in order."""

    def check(*lines, **model):
        config = tiny_run(alarms=ALARMS, model=model)
        alarms = Alarms(SimpleNamespace(config=config, rank=0))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for line in lines:
                alarms.check(line)
        return caplog.messages

    return check


def test_silent_before_their_step(said):
    line = {"expected_loops": [1.0], "local_gate": [0.0], "global_gate": [0.0]}
    assert said({"step": 99, **line}) == []
    assert len(said({"step": 100, **line})) == 3


def test_every_layer_and_bank_below_its_number_is_named(said):
    line = {"expected_loops": [1.5, 1.4], "local_gate": [0.19, 0.2], "global_gate": [0.2, 0.1]}
    assert said({"step": 100, **line}) == [
        "halting of layer 1 is stuck at one loop: expected loops 1.400 at step 100",
        "local_gate of layer 0 does not open: mean 0.1900 at step 100",
        "global_gate of layer 1 does not open: mean 0.1000 at step 100",
    ]


def test_each_is_said_once(said):
    first, second = ({"step": step, "expected_loops": [1.0]} for step in (100, 110))
    assert len(said(first, second)) == 1


def test_one_loop_is_no_stuck_halting(said):
    assert said({"step": 100, "expected_loops": [1.0]}, max_loops=1, ponder_weight=0.0) == []
