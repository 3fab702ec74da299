"""When steps that are not finite end a run: which count, how many, over log lines and restarts."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from loopmem_pretrain.config.training import FaultConfig
from loopmem_pretrain.errors import TrainingGaveUp
from loopmem_pretrain.training.faults import FAULTS_NAME, FaultWatch

CONFIG = FaultConfig(max_skipped_steps=3)


@pytest.fixture
def check(tmp_path):
    """check(watch, step, losses, applied): the judgement of the last len(losses) steps, `step` being the newest."""

    def judge(watch, step, losses, applied=None):
        engine = SimpleNamespace(skipped_steps=0, weights_are_finite=lambda: True)
        place = {"rank": 0, "run_dir": tmp_path, "position": SimpleNamespace(step=step), "save_is_due": False}
        trainer = SimpleNamespace(engine=engine, store=SimpleNamespace(steps=list), **place)
        for loss, is_applied in zip(losses, applied or [True] * len(losses), strict=True):
            watch.record(torch.tensor(loss), is_applied)
        watch.check(trainer, losses)

    return judge


@pytest.mark.parametrize(
    ("losses", "applied"),
    [
        pytest.param([math.nan] * 3, [True] * 3, id="the loss alone"),
        pytest.param([2.0] * 3, [False] * 3, id="gradients alone"),
        pytest.param([math.nan, 2.0, math.inf], [True, False, True], id="now one, now the other"),
    ],
)
def test_gives_up_at_the_configured_number_and_not_before(check, losses, applied):
    check(FaultWatch(CONFIG), 2, losses[:2], applied[:2])
    with pytest.raises(TrainingGaveUp, match="3 steps in a row, at step 3"):
        check(FaultWatch(CONFIG), 3, losses, applied)


def test_a_good_step_ends_the_row(check, tmp_path):
    watch = FaultWatch(CONFIG)
    check(watch, 5, [math.nan, math.nan, 2.0, math.nan, math.nan])
    lines = [json.loads(line) for line in (tmp_path / FAULTS_NAME).read_text().splitlines()]
    assert [line["steps"] for line in lines] == [[1, 2, 4, 5]]


def test_the_row_goes_on_over_log_lines_and_restarts(check):
    watch, resumed = FaultWatch(CONFIG), FaultWatch(CONFIG)
    check(watch, 1, [math.nan])
    check(watch, 2, [math.nan])
    resumed.restore(json.loads(json.dumps(watch.state())))
    with pytest.raises(TrainingGaveUp, match="3 steps in a row, at step 3"):
        check(resumed, 3, [math.nan])
