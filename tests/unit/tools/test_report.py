"""The report: one file, nothing from outside, every number from the run, and sections only for what there is."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loopmem_pretrain.data.manifest import Counts, Manifest, Shard, Source, Split, TokenizerRecord, write_manifest
from loopmem_pretrain.errors import ConfigError, DataError, EnvironmentFault
from loopmem_pretrain.tools.report import write_report

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects visible text, ids, references and table rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.ids, self.references = "", [], []
        self.rows: dict[str, str] = {}
        self.tables: list[str] = []
        """Rows of more than two cells."""
        self.cells: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.references.append(value)
        if tag == "tr":
            self.cells = []
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr" and len(self.cells) == 2:
            self.rows[self.cells[0]] = self.cells[1]
        elif tag == "tr":
            self.tables.append(" ".join(self.cells))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.cells and self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


def _report(run: Path) -> Page:
    return Page(write_report(run, run / "report.html"))


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> Page:
    return _report(whole_run)


def _manifest(folder: Path) -> None:
    """A manifest of 1,000 train and 400 validation tokens, 1,600 bytes of validation text."""

    def split(name: str, tokens: int, text_bytes: int) -> Split:
        shard = Shard(
            prefix=f"{name}-00000",
            documents=3,
            tokens=tokens,
            bin_bytes=2 * tokens,
            idx_bytes=1,
            bin_sha256="0" * 64,
            idx_sha256="0" * 64,
        )
        return Split(documents=3, tokens=tokens, text_bytes=text_bytes, shards=(shard,))

    def source(name: str) -> Source:
        return Source(
            path=name, bytes=500, sha256=None, revision=None, origin="Library <of> speeches", license="CC0-1.0"
        )

    folder.mkdir()
    write_manifest(
        folder,
        Manifest(
            tokenizer=TokenizerRecord(
                kind="sentencepiece",
                file="t.model",
                sha256="0" * 64,
                vocab_size=8192,
                bos_id=None,
                eos_id=0,
                pad_id=None,
                unk_id=None,
            ),
            dtype="uint16",
            splits={"train": split("train", 1000, 4000), "validation": split("validation", 400, 1600)},
            source=(source("a.jsonl"), source("b.jsonl")),
            license="CC0-1.0",
            counts=Counts(documents_read=6, broken_lines=0, empty_documents=0, filtered_documents=0, documents_kept=6),
            recipe={},
        ),
    )


def test_the_page_stands_alone(whole: Page) -> None:
    page = whole
    assert "<script" not in page.source
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert len(page.source) < 700_000


def test_ids_are_unique_and_references_find_theirs(whole: Page) -> None:
    page = whole
    assert len(page.ids) == len(set(page.ids))
    wanted = {r[1:] for r in page.references if r.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert wanted
    assert wanted <= set(page.ids)


def test_key_numbers_are_the_runs(whole: Page, whole_run: Path) -> None:
    rows = whole.rows
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()[:-1]]
    losses = [line["cross_entropy"] for line in lines if "cross_entropy" in line]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert rows["Steps"] == "4,000 of 4,000"
    assert rows["Tokens"] == f"{4000 * 88 * 4096:,}"
    assert rows["Training cross-entropy, mean of the last 10 logged"] == f"{sum(losses[-10:]) / 10:.4f} nats a token"
    assert rows["Validation loss at step 4,000"].startswith(f"{validation[-1]:.4f} nats")
    assert rows["Best validation loss"] == f"{min(validation):.4f} at step 4,000"
    loops = next(line["expected_loops"] for line in reversed(lines) if "expected_loops" in line)
    assert rows["Expected loops at the end, mean"].startswith(f"{sum(loops) / 12:.3f} ")


def test_skipped_steps_are_said(short_run: Path) -> None:
    (short_run / "metrics.jsonl").write_text('{"step": 9, "loss": 3.0, "skipped_steps": 2}\n')
    rows = _report(short_run).rows
    assert rows["Optimizer steps skipped (gradient not finite)"] == "2"
    assert rows["Training loss, mean of the last 1 logged"] == "3.0000 nats a token"


def _warnings(page: Page) -> str:
    return page.source.partition("<h2>Warnings</h2>")[2].partition("</section>")[0]


def test_alarms_and_faults_are_said(short_run: Path) -> None:
    """Those on the screen of a job that has ended are seen by nobody."""
    assert _warnings(_report(short_run)) == ""
    closed = {"expected_loops": [1.5, 1.01, *[2.0] * 10], "local_gate": [0.2] * 12, "global_gate": [0.2] * 11 + [0.001]}
    lines = [{"step": step, "loss": 3.0, **closed} for step in (900, 1000, 1100)]
    lines.append({"step": 1200, "loss": 3.0, "expected_loops": [None, 1.0, *[2.0] * 10]})
    (short_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults = [
        {"time": "-", "step": 20, "kind": "not_finite", "steps": [18], "skipped_steps": 1},
        {"time": "-", "step": 40, "kind": "not_finite", "steps": [33, 38], "skipped_steps": 3},
        {"time": "-", "step": 50, "kind": "gave_up", "reason": "a <weight> is not finite"},
    ]
    (short_run / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in faults) + '{"torn')
    said = re.sub(r"<[^>]*>+", "|", _warnings(_report(short_run)))
    for row in (
        "halting of layer 1 is stuck at one loop||1,000||1,200||3 lines, the last: expected loops 1.000",
        "global_gate of layer 11 does not open||1,000||1,100||2 lines, the last: mean 0.0010",
        "loss or gradients not finite||20||40||2 times, the last: steps [33, 38], skipped_steps 3",
        "training gave up||50||50||1 time, the last: reason a &lt;weight&gt; is not finite",
    ):
        assert row in said


def test_parameters_and_flops_are_the_papers(whole: Page) -> None:
    rows = whole.rows
    assert rows["Parameters in all"] == "210,243,900"
    training = int(rows["Training FLOPs a token (3 x forward, all loops, no recomputation)"].replace(",", ""))
    assert rows["Training FLOPs of the run"] == f"{training * 4000 * 88 * 4096:.3e}"


def test_a_plain_model_has_neither_loops_nor_memory(make_run: MakeRun) -> None:
    page = _report(make_run(looped=False, memory=False))
    assert "<h2>Loops</h2>" not in page.source
    assert "<h2>Memory</h2>" not in page.source
    assert "Expected loops at the end, mean" not in page.rows


@pytest.mark.parametrize(
    ("status", "tone"), [("done", "good"), ("failed", "bad"), ("running", ""), ("interrupted", "")]
)
def test_the_verdict_is_the_status(short_run: Path, status: str, tone: str) -> None:
    (short_run / "status.json").write_text(
        json.dumps({"status": status, "reason": "because <so>", "exit": {"code": 7}})
    )
    page = _report(short_run)
    assert f'<p class="verdict {tone}"><strong>{status}</strong> &ndash; because &lt;so&gt;</p>' in page.source
    assert page.rows["exit.code"] == "7"


def test_what_is_absent_is_said(short_run: Path) -> None:
    (short_run / "config.yaml").unlink()
    text = _report(short_run).text
    assert "No status.json: how the run ended is not known." in text
    assert "Not in the run folder, so not on this page: status.json, config.yaml, environment.json." in text


def test_lines_left_out_are_said(whole: Page) -> None:
    text = whole.text
    assert "Left out of metrics.jsonl: 9 lines of steps that were trained again after a resume." in text
    assert "Left out of metrics.jsonl: 1 line torn by a crash" in text


def test_text_by_the_model_is_escaped_and_bounded(short_run: Path) -> None:
    (short_run / "sample.txt").write_bytes(b"<script>alert(1)</script> & \xff" + b"x" * 20_000)
    page = _report(short_run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page.source
    assert "The first 8,000 of 20,029 characters." in page.text


def test_sources_and_licences_of_the_data(short_run: Path, tmp_path: Path) -> None:
    _manifest(tmp_path / "tokens")
    page = _report(short_run)
    assert "<td>Library &lt;of&gt; speeches</td><td>CC0-1.0</td><td>2</td><td>1,000</td>" in page.source
    assert page.rows["Tokens, train"] == "1,000"


def test_bits_per_byte(short_run: Path, tmp_path: Path) -> None:
    _manifest(tmp_path / "tokens")  # 4 bytes a token
    (short_run / "metrics.jsonl").write_text(
        '{"step": 1, "tokens": 9, "validation_loss": 2.772588722239781}\n'
    )  # 4 ln 2
    told = "1.00 (at the whole split's 4.000 bytes a token)"
    assert _report(short_run).rows["Validation bits per byte, about"] == told


def test_data_that_moved_is_said(whole: Page) -> None:
    assert "No manifest.json there now: moved, or on another machine." in whole.text


def test_versions(short_run: Path) -> None:
    (short_run / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}}))
    rows = _report(short_run).rows
    assert (rows["python"], rows["packages.torch"]) == ("3.11", "2.13.0")


def test_a_run_folder_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_status(short_run: Path, content: str) -> None:
    (short_run / "status.json").write_text(content)
    with pytest.raises(DataError, match=r"status\.json"):
        write_report(short_run, short_run / "report.html")


def test_a_damaged_config(short_run: Path) -> None:
    (short_run / "config.yaml").write_text("model: 3")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        write_report(short_run, short_run / "report.html")


def test_nothing_is_left_of_a_page_that_cannot_be_written(short_run: Path) -> None:
    (short_run / "report.html").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_report(short_run, short_run / "report.html")
    assert not [path for path in short_run.iterdir() if "tmp" in path.name]


def test_a_run_that_diverged(short_run: Path) -> None:
    gone = {"step": 4, "tokens": 4096, "loss": None, "expected_loops": [None, None], "local_gate": [None, None]}
    with (short_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(gone) + "\n")
    page = _report(short_run)
    assert page.rows["Training loss, mean of the last 3 logged"] == "9.0000 nats a token"
    assert page.rows["Logged lines without a finite loss, not in its mean and figure"] == "1"
    assert "Expected loops at the end, mean" not in page.rows


def test_settings_stand_as_in_yaml_and_the_command_as_it_is_typed(short_run: Path) -> None:
    environment = {"command": ["loopmem", "train", "--config", "my run.yaml"], "git_commit": None}
    (short_run / "environment.json").write_text(json.dumps(environment))
    rows = _report(short_run).rows
    assert rows["command"] == "loopmem train --config 'my run.yaml'"
    assert rows["git_commit"] == rows["evaluation.data_dir"] == "null"
    assert (rows["checkpoint.asynchronous"], rows["logging.tensorboard"]) == ("true", "false")
    assert rows["data.datasets"] == f"[{{path: {short_run.parent}/tokens, weight: 1.0}}]"


def test_starts_are_told_with_their_time_and_code(short_run: Path, tmp_path: Path) -> None:
    """Two that ended, of 1.5 h on 8 ranks and 0.5 h on 4, and between them one that was killed."""
    common = {"loopmem_pretrain": "0.1.0", "git_commit": "1f" * 20, "world_size": 8, "versions": {"torch": "2.13.0"}}
    lines = [
        {"event": "begin", "step": 0, "started": "2026-03-01T10:00:00+0100", **common},
        {"event": "end", "step": 400, "time": "2026-03-01T11:30:00+0100", "status": "interrupted"},
        {"event": "begin", "step": 400, "started": "2026-03-01T12:00:00+0100", **common},
        {"event": "begin", "step": 500, "started": "2026-03-02T02:00:00+0100", **common, "world_size": 4},
        {"event": "end", "step": 600, "time": "2026-03-02T02:30:00+0100", "status": "done"},
    ]
    (short_run / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "beg')
    (short_run / "environment.json").write_text(json.dumps(common))
    page = Page(write_report(short_run, tmp_path / "report.html"))
    assert page.rows["Starts"] == "3, 1 of them without an end on record: training, killed or hung"
    assert page.rows["Time of the starts that ended"] == "2.00 h, 14.00 h of all ranks"
    assert [" ".join(row.split()) for row in page.tables if row.startswith("2026")] == [
        "2026-03-01 10:00 0 400 1.50 8 1f1f1f1f1f interrupted",
        "2026-03-01 12:00 400 - - 8 1f1f1f1f1f no end on record",
        "2026-03-02 02:00 500 600 0.50 4 1f1f1f1f1f done",
    ]
