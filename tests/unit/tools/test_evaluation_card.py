"""An evaluation in the model card: in its place, again and again, and nowhere else."""

import pytest

from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.hf.card import EVALUATION_BEGINS, EVALUATION_ENDS
from loopmem_pretrain.tools.evaluation import describe
from loopmem_pretrain.tools.evaluation_card import check_card, section, write_card

AROUND = "# A model\r\n\n{}\n{}\n## Limits, einschließlich dieser\n"


def score(loops, threshold=None, run=None, closed=False, **measures):
    """One setting; errors are None."""
    return {
        "num_loops": loops,
        "extrapolation": False,
        "gates_closed": closed,
        "exit_threshold": threshold,
        "exit_rule": None if threshold is None else "halting",
        "mean_loops": loops if run is None else run,
        "flops_per_token": 1e6 * (run or loops),
        **measures,
        **{f"{name}_standard_error": 0.25 for name in measures},
    }


def settings(**measures):
    return [score(2, **measures), score(2, closed=True, **measures), score(2, 0.5, 1.25, **measures)]


@pytest.fixture
def evaluation(tmp_path):
    scores = settings(acc=0.5)
    return {
        "command": "loopmem eval hf --card",
        "version": "1.0",
        "model": {"path": str(tmp_path), "step": None, "dtype": "float32", "sha256": "e" * 64},
        "context": 128,
        "stride": 64,
        "device": "cpu",
        "max_loops": 2,
        "limit": 4,
        "seed": 0,
        "lm_eval": "0.4",
        "domains": [
            {
                "name": "a|b.txt",
                "documents": 2,
                "of": 9,
                "tokens": 1000,
                "bytes": 3000,
                "changed": 1,
                "text_sha256": "a" * 64,
                "scores": settings(perplexity=9.0, bits_per_byte=1.5),
            }
        ],
        "tasks": [
            {
                "task": "piqa",
                "version": 1.0,
                "suite": "commonsense",
                "measures": {"accuracy": "acc"},
                "items": 4,
                "of": 8,
                "requests": 8,
                "shortened": 1,
                "prompt_sha256": "b" * 64,
                "scores": scores,
            }
        ],
        "suites": [{"suite": "commonsense", "tasks": ["piqa"], "scores": settings(accuracy=0.5)}],
    }


@pytest.fixture
def card(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "README.md"
    path.write_bytes(AROUND.format(EVALUATION_BEGINS, EVALUATION_ENDS).encode())
    return path


def test_every_setting_with_its_error_cost_command_and_hashes(evaluation):
    text = section(evaluation)
    for setting, cost in (
        ("2", "2.000 | 2.000"),
        ("2 (memory gates closed)", "2.000 | 2.000"),
        ("2, halting 0.5", "1.250 | 1.250"),
    ):
        assert f"| a\\|b.txt | {setting} | 9.0000 | 0.25 | 1.5000 | 0.25 | {cost} | aaaaaaaa |" in text
        assert f"| piqa | {setting} | 0.5000 | 0.25 | acc | {cost} | bbbbbbbb |" in text
        assert f"| {setting} | 0.5000 | 0.25 |" in text
    assert "```\nloopmem eval hf --card\n```" in text and "e" * 64 in text
    assert f"| {'a' * 64} |" in text and f"| {'b' * 64} |" in text
    assert "| a\\|b.txt | 2 of 9 documents | 1,000 | 3,000 |" in text
    assert "a|b.txt: 1 of 2\n" in text and "bits/byte is too low there" in text
    assert "piqa: 1 of 8" in text and "not the full sets: --limit 4, drawn with seed 0" in text


def test_the_terminal_has_the_same_rows(evaluation):
    printed = [" ".join(line.split()) for line in describe(evaluation).splitlines()]
    assert "2, halting 0.5 9.0000 0.25 1.5000 0.25 1.250 1.250" in printed
    assert "a|b.txt: 1 of 2" in printed and "a|b.txt: 2 of 9 documents, 1,000 tokens, 3,000 bytes" in printed
    (domain,) = evaluation["domains"]
    told = describe({**evaluation, "domains": [{**domain, "of": None}, {**domain, "of": 2}]})
    assert "a|b.txt: the first 2 documents, 1,000" in told and "a|b.txt: 2 documents, 1,000" in told
    assert "2, halting 0.5 0.5000 0.25 acc 1.250 1.250" in printed


@pytest.mark.parametrize("tell", [describe, section])
def test_rows_that_are_no_trained_model_are_said_to_be_none(evaluation, tell):
    (domain,), note = evaluation["domains"], "run the model as it was not trained"
    alone = {**evaluation, "tasks": [], "suites": []}
    closed, forced = ([score(loops, closed=not loops, perplexity=9.0, bits_per_byte=1.5)] for loops in (0, 1))
    closed[0]["num_loops"] = 2
    as_trained = [score(2, perplexity=9.0, bits_per_byte=1.5), score(2, 0.5, 1.25, perplexity=9.0, bits_per_byte=1.5)]
    assert note in tell(evaluation)
    assert note in tell({**alone, "domains": [{**domain, "scores": closed}]})
    assert note in tell({**alone, "domains": [{**domain, "scores": forced}]})
    assert note not in tell({**alone, "domains": [{**domain, "scores": as_trained}]})


def test_a_second_evaluation_replaces_the_first(evaluation, card):
    write_card(card.parent, evaluation)
    once = card.read_bytes()
    assert write_card(card.parent, evaluation) == card and card.read_bytes() == once
    write_card(card.parent, {**evaluation, "tasks": []})
    before, after = AROUND.format(EVALUATION_BEGINS, EVALUATION_ENDS).encode().split(b"\n<!-- loopmem eval: end")
    assert card.read_bytes().startswith(before) and card.read_bytes().endswith(b"\n<!-- loopmem eval: end" + after)
    assert b"piqa" in once and b"piqa" not in card.read_bytes()
    assert {path.name for path in card.parent.iterdir()} == {"README.md", "config.json"}


@pytest.mark.parametrize(
    "marks",
    [("", ""), (EVALUATION_BEGINS, ""), (EVALUATION_ENDS, EVALUATION_BEGINS), (EVALUATION_BEGINS * 2, EVALUATION_ENDS)],
)
def test_a_card_without_a_place(evaluation, card, marks):
    content = AROUND.format(*marks).encode()
    card.write_bytes(content)
    for refusing in (lambda: check_card(card.parent), lambda: write_card(card.parent, evaluation)):
        with pytest.raises(ConfigError, match=r"README\.md has no place for an evaluation"):
            refusing()
    assert card.read_bytes() == content


def test_folders_without_a_card(card):
    card.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"README\.md is not UTF-8"):
        check_card(card.parent)
    card.unlink()
    with pytest.raises(ConfigError, match=r"README\.md does not exist"):
        check_card(card.parent)
    (card.parent / "config.json").unlink()
    with pytest.raises(ConfigError, match="is no exported folder, so it has no model card"):
        check_card(card.parent)
