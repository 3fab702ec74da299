"""What a conversion knows of the training, by the checkpoint that it converts."""

import json

from loopmem_pretrain.hf.convert import OpenedCheckpoint, history
from tests.configs import tiny_run
from tests.unit.checkpoint.published import publish


def test_an_older_checkpoint_knows_nothing_of_the_steps_after_it(tmp_path, sentences):
    """The card of a run that was converted at step 10 must not show the losses of step 15."""
    checkpoint = publish(tmp_path, 10)
    lines = [{"step": step, "tokens": 128 * step, "loss": 5.0} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = history(OpenedCheckpoint(checkpoint, tiny_run(tmp_path, sentences), 10, sentences / "tokenizer"))
    assert [record["step"] for record in known.records] == [5, 10]
    assert (known.step, known.tokens) == (10, 1280) and [data.share for data in known.data] == [1.0]
