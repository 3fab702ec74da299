"""Text to shards: right tokens, bytes that depend on nothing but recipe and text, kills, full disks, refusals."""

import fcntl
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopmem_pretrain.config.prepare import PrepareConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from loopmem_pretrain.data import prepare as prepare_module
from loopmem_pretrain.data.manifest import load_manifest, verify_shards
from loopmem_pretrain.data.prepare import USUAL_LENGTH, prepare, validation_warning
from loopmem_pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from loopmem_pretrain.data.workers import is_validation
from loopmem_pretrain.errors import DataError, EnvironmentFault
from tests.disk import assert_in_order, disk_steps

DOCUMENTS = [f"Document {i}: " + f"the state of the union is {i} and {i * i}.\n" * (i % 40 + 1) for i in range(600)]
FRACTION = 0.1


@pytest.fixture(scope="module")
def megatron() -> None:
    """Imported once, here, so that forked children do not pay 4 s each."""
    from loopmem_pretrain.data.shards import _builder_class

    _builder_class()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("corpus")
    for index in range(3):
        part = DOCUMENTS[index * 200 : index * 200 + 200]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    train_sentencepiece(DOCUMENTS, folder / "tok", TrainTokenizerConfig(vocab_size=340))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, megatron: None) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 20_000)


def recipe(corpus: Path, out: Path, **values: Any) -> PrepareConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "sources": (SourceConfig(paths=(str(corpus / "*.jsonl"),), origin="test", license="CC0"),),
        "tokenizer": TokenizerConfig(path=str(corpus / "tok")),
        "validation_fraction": FRACTION,
        "shard_tokens": 20_000,
        "num_processes": 1,
    }
    return PrepareConfig(**(defaults | values))


def content(folder: Path) -> dict[str, bytes]:
    """Every visible file below the folder; the recipe names the output folder, so it is left out."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            files[str(path.relative_to(folder))] = path.read_bytes()
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["recipe"]["output_dir"], manifest["recipe"]["num_processes"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory, megatron: None) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_BATCH_BYTES", 20_000)
        out: Path = tmp_path_factory.mktemp("whole") / "out"
        prepare(recipe(corpus, out))
        return content(out)


def read_split(folder: Path, split: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = load_manifest(folder)
    shards = [IndexedDataset(str(folder / shard.prefix)) for shard in manifest.splits[split].shards]
    return [document.tolist() for shard in shards for document in shard]


def test_every_document_once_in_order_on_its_side(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(recipe(corpus, tmp_path / "out"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    for split, held_out in (("train", False), ("validation", True)):
        expected = [text for text in DOCUMENTS if is_validation(text.encode(), FRACTION) is held_out]
        documents = read_split(tmp_path / "out", split)
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == expected
        assert {ids[-1] for ids in documents} == {tokenizer.eos_id}
        record = manifest.splits[split]
        assert (record.documents, record.tokens) == (len(expected), sum(map(len, documents)))
        assert record.text_bytes == sum(map(len, expected))
    assert manifest == load_manifest(tmp_path / "out")
    assert len(manifest.splits["train"].shards) > 3
    assert (manifest.counts.documents_read, manifest.counts.documents_kept) == (600, 600)
    assert 30 < manifest.splits["validation"].documents < 90
    assert [source.bytes for source in manifest.source] == [(corpus / f"{i}.jsonl").stat().st_size for i in range(3)]
    verify_shards(tmp_path / "out", manifest, hashes=True)
    assert sorted({path.suffix for path in (tmp_path / "out").iterdir() if path.name != ".lock"}) == [
        "", ".bin", ".idx", ".json",
    ]  # fmt: skip


@pytest.mark.parametrize("processes", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_processes(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], processes: int
) -> None:
    prepare(recipe(corpus, tmp_path, num_processes=processes))
    assert content(tmp_path) == undisturbed


def test_without_ends_of_documents(corpus: Path, tmp_path: Path) -> None:
    prepare(recipe(corpus, tmp_path, append_eos=False))
    assert not any(2 in ids for ids in read_split(tmp_path, "train"))


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process of its own group; its exit status, negative for the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(call: int) -> Callable[[Any], Any]:
    """Make the process kill itself (-9) just before its call-th fsync or rename, the steps that make files whole."""
    calls = itertools.count()

    def wrap(function: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted

    return wrap


def group_is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("step", [3, 7])
def test_killed_again_and_again(corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], step: int) -> None:
    """Each run is killed `step` disk steps after its start, the next goes on; then nothing is lost or double."""

    def work(call: int) -> Callable[[], None]:
        def run() -> None:
            kill = killed_at(call)
            os.fsync, os.replace = kill(os.fsync), kill(os.replace)
            prepare(recipe(corpus, tmp_path))

        return run

    kills, call = 0, step
    while (status := in_child(work(call))) != 0:
        assert status == -signal.SIGKILL
        assert not (tmp_path / "manifest.json").exists() or load_manifest(tmp_path)
        kills, call = kills + 1, call + step
        assert kills < 40
    assert kills >= 3
    assert content(tmp_path) == undisturbed


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_power_cut_never_finds_a_line_of_shards_that_are_not_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A shard's bytes, its name, the line of the journal, the manifest: each is on the disk before the next begins."""
    steps = disk_steps(monkeypatch)
    prepare(recipe(corpus, tmp_path))
    assert_in_order(
        steps,
        ("flush", tmp_path / f".tmp-train-00000.{suffix}"),
        ("name", tmp_path / f"train-00000.{suffix}"),
        ("flush", tmp_path),
        ("flush", tmp_path / ".journal.jsonl"),
        ("flush", tmp_path / f".tmp-train-00001.{suffix}"),
        ("name", tmp_path / "manifest.json"),
        ("flush", tmp_path),
    )


SCRIPT = """
import sys
from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.data import prepare
prepare._BATCH_BYTES = 20_000
def say(done, total, info):
    print(info["stage"], info.get("shards"), flush=True)
prepare.prepare(PrepareConfig.model_validate_json(sys.argv[1]), say)
"""


def test_killed_from_outside_leaves_no_process_and_continues(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    config = recipe(corpus, tmp_path, num_processes=2)
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenize") and line.split()[1] != "0":
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert group_is_gone(process.pid)
    with pytest.raises(DataError, match="interrupted"):
        load_manifest(tmp_path)
    stages = []
    prepare(config, lambda done, total, info: stages.append((done, total, dict(info))))
    first = next(info for _, _, info in stages if info["stage"] == "tokenize")
    assert first["shards"] > 0
    assert not any(info["stage"] == "hash sources" for _, _, info in stages)
    assert stages[-1][2]["stage"] == "complete"
    assert all(done <= total for done, total, _ in stages)
    assert content(tmp_path) == undisturbed


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the process", "its group"])
def test_sigterm_ends_the_command_as_ctrl_c_does(
    corpus: Path, tmp_path: Path, kill: Callable[[int, int], None]
) -> None:
    out = tmp_path / "out"
    large = tmp_path / "large.jsonl"
    large.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS) * 100)
    config = recipe(corpus, out, sources=(SourceConfig(paths=(str(large),), origin="test", license="CC0"),))
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "loopmem_pretrain", "prepare-data", "--config", str(tmp_path / "recipe.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / ".journal.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.endswith("loopmem: ended by SIGTERM; the same command continues where it can\n")
    assert "Traceback" not in said and not (out / "manifest.json").exists()
    assert group_is_gone(process.pid)


def interrupt(corpus: Path, out: Path, **values: Any) -> None:
    """Leave a begun folder with a few shards."""

    def stop(done: int, total: int | None, info: Any) -> None:
        if info.get("shards", 0) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(corpus, out, **values), stop)


def test_a_hub_data_set_continues_to_the_same_shards(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    files = tuple(str(corpus / f"{index}.jsonl") for index in range(3))
    hub = (SourceConfig(kind="hub", name="json", data_files=files, origin="test", license="CC0"),)
    interrupt(corpus, tmp_path, sources=hub)
    totals = []
    manifest = prepare(recipe(corpus, tmp_path, sources=hub), lambda done, total, info: totals.append(total))
    assert None in totals
    assert [source.path for source in manifest.source] == ["json/train"]
    shards = {name: data for name, data in undisturbed.items() if name.endswith((".bin", ".idx"))}
    found = content(tmp_path)
    assert {name: found[name] for name in shards} == shards


def test_small_shards_of_small_corpora(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a mebibyte would make one shard of all of it, and leave nothing to a run that is interrupted."""
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 1 << 20)
    manifest = prepare(recipe(corpus, tmp_path / "out", shard_tokens=20_000))
    shards = manifest.splits["train"].shards
    assert len(shards) > 3 and all(shard.tokens >= 20_000 for shard in shards[:-1])


def test_a_source_of_another_time_and_the_same_content_goes_on(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join((corpus / f"{i}.jsonl").read_bytes() for i in range(3)))
    sources = (SourceConfig(paths=(str(path),), origin="test", license="CC0"),)
    interrupt(corpus, tmp_path / "out", sources=sources)
    os.utime(path, ns=(1, 1))
    assert prepare(recipe(corpus, tmp_path / "out", sources=sources)).counts.documents_kept == len(DOCUMENTS)


def test_a_source_that_grows_while_it_is_read(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((corpus / "0.jsonl").read_bytes())
    sources = (SourceConfig(paths=(str(path),), origin="test", license="CC0"),)

    def grow(done: int, total: int | None, info: Any) -> None:
        if info["stage"] == "tokenize":
            path.write_bytes((corpus / "0.jsonl").read_bytes() + (corpus / "1.jsonl").read_bytes())

    with pytest.raises(DataError, match=r"not left alone while they were read\n  .*a\.jsonl: changed"):
        prepare(recipe(corpus, tmp_path / "out", sources=sources), grow)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_torn_last_line_of_the_journal_does_not_count(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    interrupt(corpus, tmp_path)
    journal = tmp_path / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    prepare(recipe(corpus, tmp_path))
    assert content(tmp_path) == undisturbed


def test_a_damaged_journal_is_refused(corpus: Path, tmp_path: Path) -> None:
    interrupt(corpus, tmp_path)
    journal = tmp_path / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"shards"', b'"shurds"', 1))
    with pytest.raises(DataError, match=r"\.journal\.jsonl:2: damaged"):
        prepare(recipe(corpus, tmp_path))


def test_a_finished_shard_that_vanished_is_noticed(corpus: Path, tmp_path: Path) -> None:
    interrupt(corpus, tmp_path)
    (tmp_path / "train-00000.bin").unlink()
    stages: list[Any] = []
    with pytest.raises(DataError, match=r"train-00000\.bin: missing") as caught:
        prepare(recipe(corpus, tmp_path), lambda done, total, info: stages.append(info["stage"]))
    assert "tokenize" not in stages and f"delete {tmp_path}" in caught.value.fix  # before work that would be in vain
    assert not (tmp_path / "manifest.json").exists()


def test_going_on_with_another_recipe_is_refused(corpus: Path, tmp_path: Path) -> None:
    interrupt(corpus, tmp_path)
    with pytest.raises(DataError, match="shard_tokens: 20000 -> 30000"):
        prepare(recipe(corpus, tmp_path, shard_tokens=30_000))


def test_going_on_with_changed_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text/a.jsonl"
    path.write_bytes(b"".join((corpus / f"{i}.jsonl").read_bytes() for i in range(3)))
    sources = (SourceConfig(paths=(str(path),), origin="test", license="CC0"),)
    interrupt(corpus, tmp_path / "out", sources=sources)
    path.write_bytes(path.read_bytes().replace(b"Document 599", b"Dokument 599"))
    with pytest.raises(DataError, match=r"a\.jsonl: other content"):
        prepare(recipe(corpus, tmp_path / "out", sources=sources))


def test_a_complete_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(recipe(corpus, tmp_path))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    stages: list[dict[str, Any]] = []
    again = prepare(recipe(corpus, tmp_path, num_processes=2), lambda done, total, info: stages.append(dict(info)))
    assert again == manifest
    assert [(info["stage"], info["already"]) for info in stages] == [("complete", True)]
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    with pytest.raises(DataError, match=r"(?s)validation_fraction: 0.1 -> 0.2.*") as caught:
        prepare(recipe(corpus, tmp_path, validation_fraction=0.2))
    assert "choose another output_dir" in caught.value.fix


def test_a_complete_folder_with_a_lost_shard_is_not_complete(corpus: Path, tmp_path: Path) -> None:
    prepare(recipe(corpus, tmp_path))
    (tmp_path / "train-00001.idx").unlink()
    with pytest.raises(DataError, match=r"train-00001\.idx: missing") as caught:
        prepare(recipe(corpus, tmp_path))
    assert f"delete {tmp_path} and prepare it again" in caught.value.fix


@pytest.mark.parametrize("name", ["train-00000.bin", "thesis.tex"])
def test_a_folder_of_other_things_is_left_alone(corpus: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"holds other things, such as {name}, and neither a manifest nor a journal"):
        prepare(recipe(corpus, tmp_path))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"mine")]


def test_a_folder_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="another process is preparing"):
            prepare(recipe(corpus, tmp_path))


def test_a_wrong_text_field_is_shown_where_nothing_is_left(corpus: Path, tmp_path: Path) -> None:
    source = SourceConfig(paths=(str(corpus / "0.jsonl"),), text_field="body", origin="test", license="CC0")
    values = {"sources": (source,), "max_broken_lines": 1000}
    with pytest.raises(DataError, match="no document is left to train on: 0 read") as caught:
        prepare(recipe(corpus, tmp_path / "out", **values))
    assert f"{corpus}/0.jsonl:1: no text in 'body'; fields: text" in caught.value.problem
    assert "text_field" in caught.value.fix
    tokenizer = TokenizerConfig(path=str(tmp_path / "new"), train=TrainTokenizerConfig(vocab_size=340))
    with pytest.raises(DataError, match="there is no text to train a tokenizer on") as caught:
        prepare(recipe(corpus, tmp_path / "other", tokenizer=tokenizer, **values))
    assert f"{corpus}/0.jsonl:1: no text in 'body'; fields: text" in caught.value.problem


def test_a_validation_split_that_training_would_refuse_is_told(corpus: Path, tmp_path: Path) -> None:
    def told(fraction: float) -> tuple[int, str]:
        manifest = prepare(recipe(corpus, tmp_path / f"{fraction}", validation_fraction=fraction))
        return manifest.splits["validation"].tokens, validation_warning(manifest, fraction)

    tokens, said = told(0.01)
    assert 0 < tokens <= USUAL_LENGTH
    assert said.startswith(f"the validation split has {tokens:,} tokens in")
    advised = float(said.split("validation_fraction: ")[1].split()[0])
    tokens, said = told(advised)
    assert tokens > USUAL_LENGTH and not said
    assert told(0.0)[1].startswith("validation_fraction 0 held no document out for validation; ")


def test_no_document_is_left(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n' * 3)
    sources = (SourceConfig(paths=(str(tmp_path / "a.jsonl"),), origin="test", license="CC0"),)
    with pytest.raises(DataError, match="no document is left to train on: 3 read, 3 empty"):
        prepare(recipe(corpus, tmp_path / "out", sources=sources))


def test_broken_lines_are_counted_over_interruptions(corpus: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for index in (10, 300, 590):
        lines[index] = "broken"
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    sources = (SourceConfig(paths=(str(tmp_path / "a.jsonl"),), origin="test", license="CC0"),)
    interrupt(corpus, tmp_path / "out", sources=sources)
    info: dict[str, Any] = {}
    manifest = prepare(recipe(corpus, tmp_path / "out", sources=sources), lambda _, __, i: info.update(i))
    assert (manifest.counts.broken_lines, manifest.counts.documents_kept) == (4, 597)
    assert [example.split(":")[1] for example in info["broken_examples"]] == ["11", "301", "591", "601"]


def test_too_many_broken_lines_then_a_higher_bound_continues(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 4 + '{"text": "good"}\n')
    sources = (SourceConfig(paths=(str(tmp_path / "a.jsonl"),), origin="test", license="CC0"),)
    with pytest.raises(DataError, match="4 broken lines, and max_broken_lines is 3"):
        prepare(recipe(corpus, tmp_path / "out", sources=sources, max_broken_lines=3, validation_fraction=0.0))
    manifest = prepare(recipe(corpus, tmp_path / "out", sources=sources, max_broken_lines=4, validation_fraction=0.0))
    assert manifest.counts.documents_kept == 1
    assert manifest.splits["validation"].shards == ()


def test_several_sources_of_which_one_has_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\nbroken\n')
    kinds = [SourceConfig(paths=(str(corpus / "0.jsonl"),), origin="a", license="CC0", max_documents=7)]
    kinds.append(SourceConfig(paths=(str(tmp_path / "empty.jsonl"),), origin="b", license="MIT"))
    manifest = prepare(recipe(corpus, tmp_path / "out", sources=tuple(kinds)))
    assert manifest.counts.documents_kept == 7
    assert (manifest.counts.empty_documents, manifest.counts.broken_lines) == (1, 1)
    assert manifest.license == "CC0; MIT"


def test_the_tokenizer_is_trained_when_the_recipe_says_how(corpus: Path, tmp_path: Path) -> None:
    settings = TokenizerConfig(path=str(tmp_path / "tok"), train=TrainTokenizerConfig(vocab_size=330))
    manifest = prepare(recipe(corpus, tmp_path / "out", tokenizer=settings))
    assert manifest.tokenizer.vocab_size == 330
    assert load_tokenizer(tmp_path / "out/tokenizer").sha256 == manifest.tokenizer.sha256
    other = TokenizerConfig(path=str(tmp_path / "tok"), train=TrainTokenizerConfig(vocab_size=340))
    with pytest.raises(DataError, match=r"tokenizer.train.vocab_size: 330 -> 340"):
        prepare(recipe(corpus, tmp_path / "out", tokenizer=other))


def test_a_manifest_that_does_not_say_of_what_it_was_made(corpus: Path, tmp_path: Path) -> None:
    prepare(recipe(corpus, tmp_path / "out"))
    file = tmp_path / "out" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "recipe": {}}))
    with pytest.raises(DataError, match="was made from something else"):
        prepare(recipe(corpus, tmp_path / "out"))


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Writing past the limit fails as on a full disk (EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_then_room_again(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], file_size_limit: Callable[[int], None]
) -> None:
    file_size_limit(30_000)
    with pytest.raises(EnvironmentFault, match="no room to write") as caught:
        prepare(recipe(corpus, tmp_path))
    file_size_limit(resource.RLIM_INFINITY)
    assert "it continues" in caught.value.fix
    assert not (tmp_path / "manifest.json").exists()
    prepare(recipe(corpus, tmp_path))
    assert content(tmp_path) == undisturbed


def test_output_dir_below_a_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        prepare(recipe(corpus, tmp_path / "file/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(corpus: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="not allowed to write"):
        prepare(recipe(corpus, tmp_path / "out"))


def test_a_killed_worker_is_an_error_not_a_hang(corpus: Path, tmp_path: Path) -> None:
    def kill_worker(done: int, total: int | None, info: Any) -> None:
        import multiprocessing

        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(EnvironmentFault, match="a tokenizing process was killed"):
        prepare(recipe(corpus, tmp_path), kill_worker)


def test_a_source_that_is_only_touched_is_the_same(corpus: Path, tmp_path: Path) -> None:
    def touch(done: int, total: int | None, info: Any) -> None:
        if info["stage"] == "tokenize":
            for path in corpus.iterdir():
                path.touch()

    assert prepare(recipe(corpus, tmp_path / "out"), touch).counts.documents_kept
