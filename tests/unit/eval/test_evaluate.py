"""What --num-loops asks for."""

import pytest

from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.eval.opening import settings_of
from loopmem_pretrain.eval.scoring import Setting
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from tests.unit.hf.conftest import SIZES, VARIANTS, model_config, native_model


def settings(variant, *num_loops):
    return settings_of(native_model(model_config(variant)), num_loops)


def test_settings():
    assert settings("plain") == [Setting(None)]
    assert settings("full") == [Setting(3)]
    assert settings("full", "2", "5", "2") == [Setting(2), Setting(5)]
    assert settings("loop", "all") == [Setting(n) for n in range(1, 7)]
    assert settings("tied", "all") == [*(Setting(n) for n in range(1, 5)), Setting(2, gates_closed=True)]


@pytest.mark.parametrize("loops", ["all", "1"])
def test_loops_of_a_model_that_does_not_loop(loops):
    with pytest.raises(ConfigError, match="does not loop"):
        settings("plain", loops)


def test_thresholds():
    model = native_model(model_config("full"))
    early = {"exit_threshold": 0.5, "exit_rule": "halting"}
    assert settings_of(model, [], [0.5]) == [Setting(3, **early)]
    assert settings_of(model, ["1", "2"], [0.5, 1.0], "confidence") == [
        Setting(n, exit_threshold=t, exit_rule="confidence") for n in (1, 2) for t in (0.5, 1.0)
    ]


def test_thresholds_follow_all_loops():
    model = native_model(model_config("full"))
    early = Setting(3, exit_threshold=0.5, exit_rule="halting")
    assert settings_of(model, ["all"], [0.5]) == [*settings_of(model, ["all"]), early]


def test_threshold_of_the_config():
    """What the model does whoever calls it, unless told otherwise."""
    exits = {"exit_threshold": 0.6, "exit_rule": "confidence"}
    model = LoopMemForCausalLM(LoopMemConfig(**SIZES, **VARIANTS["full"], **exits))
    assert settings_of(model, []) == [Setting(3, **exits)]
    assert settings_of(model, ["2"]) == [Setting(2, **exits)]
    assert settings_of(model, ["all"])[-1] == Setting(3, **exits)
    assert settings_of(model, [], [1.0]) == [Setting(3, exit_threshold=1.0, exit_rule="halting")]


@pytest.mark.parametrize("thresholds", [[0.5], []])
def test_unknown_rule(thresholds):
    with pytest.raises(ConfigError, match="--exit-rule entropy is not known"):
        settings_of(native_model(model_config("full")), [], thresholds, "entropy")


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_bad_threshold(threshold):
    with pytest.raises(ConfigError, match="--exit-threshold"):
        settings_of(native_model(model_config("full")), [], [0.5, threshold])


def test_threshold_of_a_model_that_does_not_loop():
    with pytest.raises(ConfigError, match="does not loop"):
        settings_of(native_model(model_config("plain")), [], [0.5])
