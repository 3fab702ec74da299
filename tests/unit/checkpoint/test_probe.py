"""What a checkpoint says of losses: of its own step, and on a sample that the model can read."""

import json
from types import SimpleNamespace

import pytest

from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.checkpoint.probe import _read
from loopmem_pretrain.checkpoint.state import _validation_loss
from loopmem_pretrain.errors import CheckpointError


@pytest.mark.parametrize(
    ("validated", "expected"),
    [(None, None), ((20, 2.5), 2.5), ((10, 2.5), None), ((20, float("nan")), None)],
)
def test_the_best_checkpoints_are_chosen_by_losses_of_their_own_step(validated, expected):
    """`keep_best` would keep one for what an earlier one has reached."""
    run = SimpleNamespace(validated=validated, position=Position(step=20))
    assert _validation_loss(run) == expected


def test_a_stored_sample_comes_back(tmp_path):
    assert _read(tmp_path / "probe.json", 96) is None
    (tmp_path / "probe.json").write_text(json.dumps({"loss": 2.5, "tokens": [[0, 95], [3, 4]]}))
    assert _read(tmp_path / "probe.json", 96) == (2.5, [[0, 95], [3, 4]])


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        (2.5, [[0, 96]]),  # a GPU would end in an assertion of the device, without a name
        (2.5, [[-1, 3]]),
        (2.5, [[0, 1], [0, 1, 2]]),
        (2.5, [[1]]),
        (2.5, []),
        (float("nan"), [[0, 1]]),
        ("x", [[0, 1]]),
    ],
    ids=str,
)
def test_a_stored_sample_that_cannot_be_read_is_named(tmp_path, loss, tokens):
    (tmp_path / "probe.json").write_text(json.dumps({"loss": loss, "tokens": tokens}))
    with pytest.raises(CheckpointError, match=r"probe\.json holds no stored sample"):
        _read(tmp_path / "probe.json", 96)
