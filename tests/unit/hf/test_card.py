"""The model card says what is known, in tables that hold together."""

import pytest

from loopmem_pretrain.data.manifest import load_manifest
from loopmem_pretrain.hf.card import CURVE_ROWS, DataShare, History, markdown_table, model_card
from loopmem_pretrain.hf.verify import Comparison
from loopmem_pretrain.model.flops import forward_flops_per_token
from tests.unit.hf.conftest import VARIANTS, model_config

COMPARISON = Comparison(8, 512, 200, 0.0, 9.0, 9e-5, 2.5, 2.5, 16, (1.25, 1.75))


def history(sentences, records=()) -> History:
    share = DataShare("runs/x/tokens", 1.0, load_manifest(sentences))
    return History(1200, 300_000, (share,), tuple(records), {"torch": "2.13.0"})


def test_data_and_training_curve(sentences):
    records = [{"step": n, "tokens": 250 * n, "cross_entropy": 5 - n / 1000} for n in range(1, 1201)]
    for record in records[99::100]:
        record["validation_loss"] = record["cross_entropy"] + 0.1
    text = model_card(model_config("full"), "bfloat16", 48, COMPARISON, history(sentences, records))
    manifest = load_manifest(sentences)
    assert f"{manifest.splits['train'].tokens:,} tokens in {manifest.splits['train'].documents:,} documents" in text
    assert f"| {manifest.source[0].origin} | {manifest.license} |" in text
    assert "1,200 steps, 300,000 tokens; torch 2.13.0." in text
    assert "| 1,200 | 300,000 | 3.8000 | 3.9000 |" in text
    assert sum(line.endswith("00 |") and line.count("|") == 5 for line in text.splitlines()) == CURVE_ROWS
    assert "loopmem eval . --data runs/x/tokens" in text and "loopmem eval . --text HELD_OUT.jsonl --num-loops" in text


def test_what_was_seen_of_each_part_of_a_blend(sentences):
    parts = [DataShare(f"runs/x/{name}", share, load_manifest(sentences)) for name, share in (("a", 0.25), ("b", 0.75))]
    known = history(sentences)._replace(data=tuple(parts))
    text = model_card(model_config("full"), "float32", 48, COMPARISON, known)
    tokens = parts[0].manifest.splits["train"].tokens
    for name, share, seen in (("a", "25.0%", 75_000), ("b", "75.0%", 225_000)):
        line = next(line for line in text.splitlines() if line.startswith(f"`{name}`"))
        assert f"`{name}`, {share} of the samples: {tokens:,} tokens in" in line
        assert line.endswith(f"of which the run saw {seen:,} ({seen / tokens:.2f} epochs).")


def test_imported_weights_are_named_without_their_place(sentences):
    config, known = model_config("full"), history(sentences)
    origin = {"folder": "/data/secret/Qwen3-0.6B", "model_type": "qwen3"}
    text = model_card(config, "float32", 48, COMPARISON, known._replace(origin=origin))
    assert "Continues from the weights in `Qwen3-0.6B` (model_type `qwen3`).\n\n1,200 steps" in text
    assert "secret" not in text
    assert "Continues from" not in model_card(config, "float32", 48, COMPARISON, known)


def test_loops_and_flops(sentences):
    config = model_config("full")
    text = model_card(config, "float32", 48, COMPARISON, history(sentences))
    full = forward_flops_per_token(config, 48).total
    one, two = (forward_flops_per_token(config, 48, num_loops=n).total for n in (1, 2))
    assert f"{full / 1e6:,.3f} MFLOPs forward with all 3 loops" in text
    assert f"1.50 on average, it would be {(one + two) / 2 / 1e6:,.3f} MFLOPs" in text
    assert "| 0 | 1.250 |\n| 1 | 1.750 |" in text
    assert "What the model was trained on" not in text and "Cross-entropy" not in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_without_a_history(variant):
    config = model_config(variant)
    loops = COMPARISON.expected_loops if config.max_loops else ()
    text = model_card(config, "float32", 48, COMPARISON._replace(expected_loops=loops))
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "What the model was trained on is not recorded here." in text
    assert ("## Loops and FLOPs" in text) and ("Expected loops" in text) == bool(loops)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Loops and FLOPs", "## Data", "## Evaluation", "## Limits"]


def test_cells_cannot_break_a_table():
    assert markdown_table(["a", "b"], [["x|y\nz", "12"]]) == ["| a | b |", "| --- | ---: |", "| x\\|y z | 12 |"]
