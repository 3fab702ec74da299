"""Log files survive a crash and are flat where a service wants scalars."""

import json
import resource

from loopmem_pretrain.training.loggers import JsonlLogger, flatten


def test_a_torn_line_is_left_alone_and_the_next_begins_on_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    logger = JsonlLogger(path)
    logger.log({"step": 2, "loss": 1.5})
    logger.close()
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [{"step": 1}, {"step": 2, "loss": 1.5}]


def test_infinities_become_null(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"step": 1, "grad_norm": float("inf"), "lambdas": [[float("nan"), 0.5]]})
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "lambdas": [[null, 0.5]]}\n'


def test_lines_are_appended(tmp_path):
    for step in (1, 2):
        logger = JsonlLogger(tmp_path / "metrics.jsonl")
        logger.log({"step": step})
        logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_of_which_the_disk_took_a_part_is_completed(tmp_path):
    """Beyond a limit the system writes a part first, then refuses: as when a disk fills up."""
    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = JsonlLogger(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        logger.log({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b'{"ste'
    logger.log({"step": 2})
    logger.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_flatten():
    assert flatten({"step": 3, "E": [1.0, 2.0], "lam": [[0.5, 0.4]], "note": "x", "task": {"a/acc": 0.5}}) == {
        "step": 3,
        "E/layer_00": 1.0,
        "E/layer_01": 2.0,
        "lam/layer_00/loop_1": 0.5,
        "lam/layer_00/loop_2": 0.4,
        "task/a/acc": 0.5,
    }
