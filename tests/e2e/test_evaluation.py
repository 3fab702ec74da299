"""`loopmem eval` on a trained run and its export: one set of numbers, whatever way they are asked for."""

import json
import math
import shutil
from pathlib import Path

import pytest

from loopmem_pretrain.cli import main
from tests.e2e.test_training import config_for, lines, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sentences):
    """A run folder of 6 steps."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    assert run(config_for(folder, sentences, training={"train_steps": 6}), ranks=1) == ("done", None)
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    from loopmem_pretrain.hf.convert import convert_run

    convert_run(trained, trained.parent / "hf")
    return trained.parent / "hf"


@pytest.fixture
def evaluate(tmp_path):
    """evaluate(*arguments): the JSON that the command writes."""

    def run(*arguments):
        assert main(["eval", *map(str, arguments), "--out", str(tmp_path / "out.json")]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.fixture
def refused(capsys):
    """refused(code, *arguments): what is said on stderr."""

    def run(code, *arguments):
        assert main(["eval", *map(str, arguments)]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said and "what to do" in said
        return said

    return run


def test_training_logged_the_same_on_the_same_samples(trained):
    """The packed samples of validation, scored as windows: what the trained engine gave, to float32."""
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig
    from loopmem_pretrain.data.dataset import open_validation
    from loopmem_pretrain.eval.scoring import Setting, Window, window_scores
    from loopmem_pretrain.inference.opening import open_model

    config = load_config(RunConfig, trained / "config.yaml")
    samples, length = open_validation(config.data, config.validation.num_samples), config.data.seq_length
    cut = [Window(0, samples[index].tolist(), length) for index in range(config.validation.num_samples)]
    scores = window_scores(open_model(trained)[0], cut, 4, Setting(config.model.max_loops))
    loss = math.fsum(score.nats for score in scores) / (length * len(cut))
    assert loss == pytest.approx(lines(trained)[-1]["validation_loss"], abs=1e-5)


def test_whole_documents_are_near_what_training_logged(trained, evaluate, sentences):
    """Other windows and all documents, but the same distribution: near, not equal."""
    result = evaluate(trained, "--batch-size", 16)
    (domain,) = result["domains"]
    manifest = json.loads((sentences / "manifest.json").read_text())
    split = manifest["splits"]["validation"]
    assert domain["name"] == str(sentences) and domain["documents"] == split["documents"]
    assert domain["bytes"] == split["text_bytes"]
    assert domain["tokens"] == split["tokens"] - split["documents"]  # end marks are context, not text
    (score,) = domain["scores"]
    assert math.log(score["perplexity"]) == pytest.approx(lines(trained)[-1]["validation_loss"], rel=0.1)
    assert score["perplexity"] == pytest.approx(math.exp(score["nats"] / domain["tokens"]))
    for total, each in (
        (score["nats"], score["document_nats"]),
        (domain["tokens"], domain["document_tokens"]),
        (domain["bytes"], domain["document_bytes"]),
    ):
        assert len(each) == domain["documents"] and math.fsum(each) == pytest.approx(total)
    assert score["bits_per_byte"] == pytest.approx(score["nats"] / math.log(2) / domain["bytes"])
    assert 0 < score["perplexity_standard_error"] < score["perplexity"]
    assert result["model"]["step"] == 6 and result["model"]["path"].endswith("step_00000006")
    assert (result["context"], result["stride"], result["max_documents"]) == (16, 8, None)


def test_all_loops(trained, evaluate, capsys):
    (domain,) = evaluate(trained, "--num-loops", "all", "--max-documents", 3)["domains"]
    rows = [(row["num_loops"], row["extrapolation"], row["gates_closed"]) for row in domain["scores"]]
    assert rows == [*((n, n > 3, False) for n in range(1, 7)), (3, False, True)]
    assert len({row["nats"] for row in domain["scores"]}) == 7
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    firsts = [cells[1] for cells in table if len(cells) > 1]
    assert firsts[1:] == ["1", "2", "3", *(f"{n} (extrapolation)" for n in (4, 5, 6)), "3 (memory gates closed)"]


def test_export_and_text_give_the_runs_numbers(trained, exported, evaluate, sentences, tmp_path):
    from loopmem_pretrain.eval.documents import prepared_domains

    (domain,) = prepared_domains([str(sentences)], 5)
    texts = [json.dumps({"text": text.decode()}) for text in domain.texts]
    assert len(texts) == 5 < domain.of
    (tmp_path / "held_out.jsonl").write_text("\n".join(texts) + "\n")
    ways = [
        evaluate(trained, "--max-documents", 5),
        evaluate(exported, "--max-documents", 5, "--data", sentences),
        evaluate(exported, "--text", tmp_path / "held_out.jsonl"),
    ]
    first, *others = (way["domains"][0] for way in ways)
    for other in others:
        assert {key: other[key] for key in ("documents", "tokens", "bytes", "text_sha256")} == {
            key: first[key] for key in ("documents", "tokens", "bytes", "text_sha256")
        }
        assert other["scores"][0]["nats"] == pytest.approx(first["scores"][0]["nats"], rel=1e-6)
    assert [way["domains"][0]["of"] for way in ways] == [domain.of, domain.of, 5]
    assert ways[1]["model"] == ways[2]["model"] and ways[1]["model"]["step"] is None


def test_two_domains(trained, evaluate, tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"the of and {name}\n")
    result = evaluate(trained, "--text", tmp_path / "one.txt", tmp_path / "two.txt", "--num-loops", 2, 1)
    assert result["command"].startswith(
        f"loopmem eval {trained} --text {tmp_path}/one.txt {tmp_path}/two.txt --num-loops"
    )
    assert [domain["name"] for domain in result["domains"]] == [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    for domain in result["domains"]:
        assert [row["num_loops"] for row in domain["scores"]] == [2, 1]
        assert (domain["documents"], domain["bytes"]) == (1, len("the of and one.txt\n"))
        assert domain["scores"][0]["perplexity_standard_error"] is None


def test_text_that_cannot_be_read(trained, refused, tmp_path):
    for name, content in (("empty.txt", b""), ("text.doc", b"a"), ("blank.txt", b" \n"), ("binary.txt", b"a\0b")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken.jsonl").write_text('{"text": "the"}\n{"txt": "of"}\n')
    (tmp_path / "folder").mkdir()
    names = ("empty.txt", "text.doc", "nowhere.txt", "folder")
    said = refused(3, trained, "--text", *(tmp_path / name for name in names))
    for problem in ("empty.txt: empty, 0 bytes", "text.doc: unknown type", "nowhere.txt: no such file"):
        assert problem in said
    assert "folder: a folder; name its files, or prepared data by --data" in said
    assert "holds no document with a visible character" in refused(3, trained, "--text", tmp_path / "blank.txt")
    assert "binary" in refused(3, trained, "--text", tmp_path / "binary.txt")
    assert "broken.jsonl:2: no text in 'text'" in refused(3, trained, "--text", tmp_path / "broken.jsonl")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--batch-size", "0"], "--batch-size 0 is not valid"),
        (["--max-documents", "-1"], "--max-documents -1 is not valid"),
        (["--num-loops", "0", "2", "two"], "--num-loops 0 two is not valid"),
        (["--num-loops", "all", "2"], "--num-loops all is not valid"),
    ],
)
def test_values_that_cannot_be_meant(trained, refused, flags, problem):
    assert problem in refused(2, trained, *flags)


def test_an_export_without_text(exported, refused):
    assert "has no validation split" in refused(2, exported)


def test_prepared_data_without_a_validation_split(trained, refused, sentences, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(sentences, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["validation"] = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "the validation split is empty" in refused(3, trained, "--data", folder)


def test_a_tokenizer_of_another_model(exported, refused, tmp_path):
    """An export with a larger vocabulary's tokenizer beside it."""
    folder, text = tmp_path / "hf", tmp_path / "text.txt"
    shutil.copytree(exported, folder)
    text.write_text("the of and")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["qqqq"] = 320
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "it has 321 tokens, the model's vocab_size is 320" in refused(5, folder, "--text", text)


def test_an_export_that_does_not_say_its_context(exported, refused, tmp_path):
    folder, text = tmp_path / "hf", tmp_path / "text.txt"
    shutil.copytree(exported, folder)
    text.write_text("the of and")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": None}))
    assert "max_position_embeddings is null" in refused(2, folder, "--text", text)


def test_what_is_no_model(refused, tmp_path):
    assert "holds no checkpoint" in refused(4, Path(tmp_path))
    said = refused(2, Path(tmp_path) / "none")
    assert "none: no such folder" in said and "eval also take an exported folder" in said
