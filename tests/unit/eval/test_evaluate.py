"""What --num-loops asks for."""

import pytest

from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.eval.opening import settings_of
from loopmem_pretrain.eval.scoring import Setting
from tests.unit.hf.conftest import model_config, native_model


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
