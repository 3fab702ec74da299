"""A start stops while there is still time for an interval and a save."""

import subprocess
import sys

import pytest

from loopmem_pretrain.training.time_limit import ENDING, MARGIN, TimeLimit, seconds_since_process_start


def test_no_limit_is_never_due():
    assert not TimeLimit(None).is_due(0)


@pytest.mark.parametrize(("more", "is_due"), [(-5, True), (5, False)])
def test_due_while_an_interval_and_two_saves_still_fit(more, is_due):
    limit = TimeLimit(round(seconds_since_process_start() + MARGIN * (100 + 2 * 300) + ENDING) + more)
    limit.longest_interval = 100.0
    assert limit.is_due(300.0) is is_due


def test_the_time_since_the_start_of_the_process_is_gone():
    limit = TimeLimit(MARGIN * 100 + ENDING + seconds_since_process_start() / 2)
    limit.longest_interval = 100.0
    assert limit.is_due(0)


def test_intervals_are_measured_between_agreements():
    limit = TimeLimit(10**9)
    limit.is_due(0)
    assert limit.longest_interval == 0
    limit.is_due(0)
    assert 0 < limit.longest_interval < 1


def test_the_process_start_counts_what_came_before_the_import():
    code = "import time; time.sleep(1)\nfrom loopmem_pretrain.training.time_limit import seconds_since_process_start\n"
    code += "print(seconds_since_process_start())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert 1 <= float(said) < 30
