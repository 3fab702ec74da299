"""Loss curves that are spikes and ones that are not."""

import json
import math
import random

import pytest

from loopmem_pretrain.config.training import FaultConfig
from loopmem_pretrain.training.spikes import SpikeDetector

CONFIG = FaultConfig(spike_window_steps=64, spike_patience_steps=5)


def spikes(losses, config=CONFIG, detector=None):
    detector = detector or SpikeDetector(config)
    return [spike for step, loss in enumerate(losses, 1) if (spike := detector.update(step, loss))]


def noisy(losses, relative=0.02, seed=0):
    draw = random.Random(seed)
    return [loss * draw.gauss(1, relative) for loss in losses]


WARM_UP = [2.5 + 8 * math.exp(-step / 60) for step in range(600)]
QUIET = {
    "noise": noisy([2.5] * 3000),
    "flat": [2.5] * 500,
    "the last digits of a flat loss": noisy([2.5] * 1000, relative=0.001),
    "a memorised corpus": [0.0] * 200 + [1e-12] * 200,
    "a slow rise": noisy([2.5 + step / 1000 for step in range(2000)]),
    "warm-up": noisy(WARM_UP),
    "warm-up without noise": WARM_UP,
    "single outliers": [9.0 if step % 50 == 49 else loss for step, loss in enumerate(noisy([2.5] * 1000))],
    "four in a row": [9.0 if 500 <= step < 504 else loss for step, loss in enumerate(noisy([2.5] * 1000))],
    "a fall": noisy([2.5] * 300 + [1.5] * 300),
    "high before there is a window": noisy([2.5] * 20 + [9.0] * 11),
}


@pytest.mark.parametrize("curve", QUIET)
def test_no_spike(curve):
    assert spikes(QUIET[curve]) == []


@pytest.mark.parametrize(
    ("window", "deviation"),
    [
        pytest.param([1.9, 2.0, 2.1] * 22, 1.4826 * 0.1, id="median absolute deviation"),
        pytest.param([2.0] * 64, 0.005 * 2.0, id="flat: a share of the median"),
    ],
)
def test_high_is_what_lies_so_many_deviations_above_the_median(window, deviation):
    config = FaultConfig(spike_window_steps=64, spike_patience_steps=1, spike_score=6.0)
    assert spikes([*window, 2.0 + 5.99 * deviation], config) == []
    (spike,) = spikes([*window, 2.0 + 6.01 * deviation], config)
    assert spike.usual == pytest.approx(2.0) and spike.score == pytest.approx(6.01)


@pytest.mark.parametrize(("losses", "found"), [(31, 0), (32, 1)])
def test_half_a_window_is_needed_and_enough(losses, found):
    config = FaultConfig(spike_window_steps=64, spike_patience_steps=1)
    assert len(spikes([2.0] * losses + [9.0], config)) == found


def test_a_step_up_is_found_once_with_its_first_step():
    (spike,) = spikes(noisy([2.5] * 300 + [4.0] * 40 + [2.5] * 100))
    assert (spike.first_step, spike.last_step) == (301, 305)
    assert spike.usual == pytest.approx(2.5, rel=0.02) and spike.loss == pytest.approx(4, rel=0.1)
    assert spike.score > 20


def test_two_spikes_are_two():
    found = spikes(noisy([2.5] * 300 + [4.0] * 10 + [2.5] * 5 + [4.0] * 10))
    assert [spike.first_step for spike in found] == [301, 316]


def test_losses_that_are_not_finite_neither_make_nor_end_a_spike():
    assert spikes([2.5] * 100 + [math.nan, math.inf, -math.inf] * 30) == []
    (spike,) = spikes([2.5] * 100 + [4.0, math.nan, 4.0, 4.0, math.inf, 4.0, 4.0])
    assert (spike.first_step, spike.last_step) == (101, 107)


def test_a_level_that_stays_is_accepted():
    """After a window of high losses their level is the usual one, and what rises above it is a spike again."""
    found = spikes(noisy([2.5] * 300 + [4.0] * 300 + [8.0] * 10))
    assert [spike.first_step for spike in found] == [301, 601]


@pytest.mark.parametrize("cut", [10, 250, 302, 304, 306, 350])
def test_its_state_is_all_there_is(cut):
    losses = noisy([2.5] * 300 + [4.0] * 20 + [2.5] * 100 + [5.0] * 8)
    whole, first = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    expected = spikes(losses, detector=whole)
    found = spikes(losses[:cut], detector=first)
    second = SpikeDetector(CONFIG)
    second.restore(json.loads(json.dumps(first.state())))
    found += [spike for step, loss in enumerate(losses[cut:], cut + 1) if (spike := second.update(step, loss))]
    assert found == expected and len(found) == 2
    assert second.state() == whole.state()


def test_a_window_made_shorter_during_a_spike():
    """The level is accepted nevertheless, and what is kept does not grow."""
    long = SpikeDetector(FaultConfig(spike_window_steps=512))
    spikes(noisy([2.5] * 600 + [4.0] * 200), detector=long)
    short = SpikeDetector(CONFIG)
    short.restore(long.state())
    assert spikes(noisy([4.0] * 100, seed=1), detector=short) == []
    assert short.high == [] and len(short.window) == 64
