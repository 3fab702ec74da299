"""One self-contained HTML page about a run: what was trained on what, how it went, what to look at.

Reads the run folder's metrics.jsonl and, where they exist, status.json (`status`, `reason`, other values), config.yaml
(the resolved configuration), faults.jsonl (what training reported), starts.jsonl, sample.txt (text by the model),
environment.json (versions), and the manifests of the training data. What does not exist is named at the end of the page
(not sample.txt, which the demo writes, nor faults.jsonl and starts.jsonl); what exists and is damaged is an error.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from loopmem_pretrain.alarms import alarms
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.files import require_folder, write_file
from loopmem_pretrain.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from loopmem_pretrain.errors import DataError
from loopmem_pretrain.metrics_file import FAULTS_NAME, METRICS_NAME, Metrics, Record, load_metrics, read_lines
from loopmem_pretrain.model.flops import forward_flops_per_token, parameter_counts, training_flops_per_token
from loopmem_pretrain.tools.figures import FAINT, INK, layer_series, series, training_loss
from loopmem_pretrain.tools.plot import PLOTS, Plot, render
from loopmem_pretrain.tools.report_style import PAGE
from loopmem_pretrain.tools.starts import HEADINGS, Start, read_starts, row, summary
from loopmem_pretrain.words import counted

SAMPLE_CHARACTERS = 8000
FAULTS = {
    "not_finite": "loss or gradients not finite",
    "spike": "loss spike",
    "rewind": "rewound past a spike",
    "no_checkpoint": "no checkpoint from before a spike",
    "gave_up": "training gave up",
}
"""What the kinds of faults.jsonl are called on the page."""
TONES = {"done": "good", "failed": "bad"}  # of a status; any other is neither

Row = Sequence[object]


class Run(NamedTuple):
    """Everything the page is made of; None where the run folder does not have it."""

    folder: Path
    metrics: Metrics
    status: dict[str, Any] | None
    config: RunConfig | None
    manifests: dict[str, Manifest | None]
    faults: list[Record]
    starts: list[Start]
    sample: str | None
    environment: dict[str, Any] | None


def write_report(run_dir: str | Path, out_path: str | Path) -> Path:
    """Write the report of a run as one HTML file, whole or not at all; returns its path.

    Raises:
        DataError: the run has no usable metrics.jsonl, or a file of the run folder is damaged.
        ConfigError: no such folder, or config.yaml is damaged.
        EnvironmentFault: the file cannot be written.
    """
    run = _read(Path(run_dir))
    figures = _figures(run.metrics.records)
    opening = f'<div class="pair">{_numbers(run)}{figures.pop("Loss", "")}</div>'
    sections = [_verdict(run), _warnings(run), _section("Key numbers", opening)]
    sections += [_section(group, f'<div class="figures">{drawn}</div>') for group, drawn in figures.items()]
    sections += [_sample(run), _model(run), _data(run), _environment(run), _notes(run)]
    name = run.folder.resolve().name
    page = PAGE.replace("{{title}}", escape(name)).replace("{{body}}", "\n".join(filter(None, sections)))
    write_file(Path(out_path), page.encode(errors="replace"))
    return Path(out_path)


def _read(folder: Path) -> Run:
    require_folder(folder, "give the folder of a run that has begun to train")
    metrics = load_metrics(folder / METRICS_NAME)
    config = load_config(RunConfig, folder / "config.yaml") if (folder / "config.yaml").exists() else None
    paths = [dataset.path for dataset in config.data.datasets] if config else []
    manifests = {path: load_manifest(path) if (Path(path) / MANIFEST_NAME).exists() else None for path in paths}
    sample = folder / "sample.txt"
    return Run(
        folder,
        metrics,
        _read_json(folder / "status.json"),
        config,
        manifests,
        read_lines(folder / FAULTS_NAME),
        read_starts(folder),
        sample.read_text(encoding="utf-8", errors="replace") if sample.exists() else None,
        _read_json(folder / "environment.json"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is damaged: {error}", "remove the file; the report does without it") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object", "remove the file; the report does without it")
    return values


# ---- sections --------------------------------------------------------------------------------------------------


def _verdict(run: Run) -> str:
    if run.status is None:
        return '<p class="verdict">No status.json: how the run ended is not known.</p>'
    status, reason = str(run.status.get("status", "unknown")), run.status.get("reason")
    told = f" &ndash; {escape(str(reason))}" if reason else ""
    others = [(key, value) for key, value in _flat(run.status) if key not in ("status", "reason")]
    details = f"<details><summary>status.json</summary>{_table(others)}</details>" if others else ""
    return f'<p class="verdict {TONES.get(status, "")}"><strong>{escape(status)}</strong>{told}</p>{details}'


def _warnings(run: Run) -> str:
    """Alarms of the history that the page shows, and every line of faults.jsonl, also of steps since trained again."""
    lasting: dict[str, list[tuple[int, str]]] = {}
    if run.config is not None:
        for record in run.metrics.records:
            for problem, value in alarms(record, run.config):
                lasting.setdefault(problem, []).append((record["step"], value))
    rows: list[Row] = [
        (problem, f"{times[0][0]:,}", f"{times[-1][0]:,}", f"{counted(len(times), 'line')}, the last: {times[-1][1]}")
        for problem, times in lasting.items()
    ]
    kinds: dict[str, list[Record]] = {}
    for fault in run.faults:
        kinds.setdefault(str(fault.get("kind")), []).append(fault)
    for kind, faults in kinds.items():
        told = _flat({key: value for key, value in faults[-1].items() if key not in ("kind", "step", "time")})
        details = ", ".join(f"{key} {value}" for key, value in told)
        last = f"{counted(len(faults), 'time')}" + (f", the last: {details}" if details else "")
        steps = [fault["step"] for fault in faults]
        rows.append((FAULTS.get(kind, kind), f"{min(steps):,}", f"{max(steps):,}", last))
    if not rows:
        return ""
    return _section("Warnings", _table(rows, head=("What", "First at step", "Last at step", "How often")))


def _numbers(run: Run) -> str:
    records, last, config = run.metrics.records, run.metrics.records[-1], run.config
    rows: list[Row] = [("Steps", f"{last['step']:,}" + (f" of {config.training.train_steps:,}" if config else ""))]
    if "tokens" in last:
        rows.append(("Tokens", f"{last['tokens']:,}"))
    key, name = training_loss(records)
    if recent := _values(records, key)[-10:]:
        mean = sum(recent) / len(recent)
        rows.append((f"Training {name}, mean of the last {len(recent)} logged", f"{mean:.4f} nats a token"))
    if broken := sum(key in record for record in records) - len(_values(records, key)):
        rows.append((f"Logged lines without a finite {name}, not in its mean and figure", f"{broken:,}"))
    steps, losses = series(records, "validation_loss")
    if validated := list(zip(losses.tolist(), steps.astype(int).tolist(), strict=True)):
        (end, at), (best, best_at) = validated[-1], min(validated)
        rows.append(
            (f"Validation loss at step {at:,}", f"{end:.4f} nats a token (perplexity {math.exp(min(end, 700)):.2f})")
        )
        rows.append(("Best validation loss", f"{best:.4f} at step {best_at:,}"))
        rows += _bits_per_byte(run, end)
    if rates := _values(records, "tokens_per_second"):
        rows.append(("Throughput, median", f"{median(rates):,.0f} tokens/s"))
    if shares := _values(records, "mfu"):
        rows.append(("Model FLOPs utilisation, median", f"{median(shares):.1%}"))
    rows += summary(run.starts)
    if last.get("skipped_steps"):
        rows.append(("Optimizer steps skipped (gradient not finite)", f"{last['skipped_steps']:,}"))
    for key, label in (
        ("expected_loops", "Expected loops at the end"),
        ("local_gate", "Local gate at the end"),
        ("global_gate", "Global gate at the end"),
    ):
        if len(found := layer_series(records, key)[1]):
            mean, least, most = found[-1].mean(), found[-1].min(), found[-1].max()
            rows.append((f"{label}, mean", f"{mean:.3f} (layers {least:.3f} ... {most:.3f})"))
    return _table(rows)


def _bits_per_byte(run: Run, loss: float) -> list[Row]:
    """Cross-entropy in bits over the bytes behind a token; needs one validation split whose bytes are known.

    About, since the samples of a validation are a part of the split: `loopmem eval` measures it.
    """
    manifests = list(run.manifests.values())
    split = manifests[0].splits["validation"] if len(manifests) == 1 and manifests[0] else None
    if split is None or not split.text_bytes or not split.tokens:
        return []
    size = split.text_bytes / split.tokens
    bits = loss / math.log(2) / size
    return [("Validation bits per byte, about", f"{bits:.2f} (at the whole split's {size:.3f} bytes a token)")]


def _figures(records: list[Record]) -> dict[str, str]:
    """Group -> its figures, those that the run has data for."""
    groups: dict[str, str] = {}
    for plot in PLOTS:
        svg = render(plot, records, "svg")
        if svg is not None:
            caption = f"<figcaption><strong>{plot.title}.</strong> {plot.look_for}</figcaption>"
            figure = f"<figure>{caption}{_inline(plot, svg.decode())}</figure>"
            groups[plot.group] = groups.get(plot.group, "") + figure
    return groups


def _inline(plot: Plot, svg: str) -> str:
    """An SVG file's text as an element of the page: its colours, its font, ids of its own, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*" height="[^"]*"', f' role="img" aria-label="{escape(plot.title)}"', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--line)").replace("'DejaVu Sans'", "inherit")


def _sample(run: Run) -> str:
    if run.sample is None:
        return ""
    shown = run.sample[:SAMPLE_CHARACTERS]
    cut = f"<p>The first {SAMPLE_CHARACTERS:,} of {len(run.sample):,} characters.</p>" if shown != run.sample else ""
    return _section("Text by the model", f"<pre>{escape(shown)}</pre>{cut}")


def _model(run: Run) -> str:
    if run.config is None:
        return ""
    model, length = run.config.model, run.config.data.seq_length
    samples = run.config.training.micro_batch_size
    counts, flops = parameter_counts(model), forward_flops_per_token(model, length, tokens=samples * length)
    training = training_flops_per_token(model, length, samples)
    rows: list[Row] = [(f"Parameters: {name}", f"{count:,}") for name, count in counts._asdict().items() if count]
    rows.append(("Parameters in all", f"{counts.total:,}"))
    rows += [(f"Forward FLOPs a token: {name.replace('_', ' ')}", f"{n:,}") for name, n in flops._asdict().items() if n]
    rows.append(("Training FLOPs a token (3 x forward, all loops, no recomputation)", f"{training:,}"))
    if "tokens" in (last := run.metrics.records[-1]):
        rows.append(("Training FLOPs of the run", f"{training * last['tokens']:.3e}"))
    fields = _table(_flat(model.model_dump(mode="json")))
    settings = _table(_flat(run.config.model_dump(mode="json", exclude={"model"})))
    whole = f"<details><summary>All other settings</summary>{settings}</details>"
    return _section("Model", f'<div class="pair">{fields}{_table(rows)}</div>{whole}')


def _data(run: Run) -> str:
    if run.config is None:
        return ""
    parts = []
    for dataset in run.config.data.datasets:
        manifest = run.manifests[dataset.path]
        parts.append(f"<h3><code>{escape(dataset.path)}</code></h3>")
        if manifest is None:
            parts.append("<p>No manifest.json there now: moved, or on another machine.</p>")
            continue
        parts.append(
            _table(
                [
                    ("Weight", dataset.weight if dataset.weight == "tokens" else f"{dataset.weight:g}"),
                    *((f"Tokens, {name}", f"{split.tokens:,}") for name, split in manifest.splits.items()),
                    *((f"Documents, {name}", f"{split.documents:,}") for name, split in manifest.splits.items()),
                    ("Tokenizer", f"{manifest.tokenizer.kind}, {manifest.tokenizer.vocab_size:,} pieces"),
                    ("Licence", manifest.license),
                ]
            )
        )
        sources: dict[tuple[str, str], list[int | None]] = {}
        for source in manifest.source:
            sources.setdefault((source.origin, source.license), []).append(source.bytes)
        read = [(*key, len(sizes), f"{sum(size or 0 for size in sizes):,}") for key, sizes in sources.items()]
        if read:
            parts.append(_table(read, head=("Source", "Licence", "Files", "Bytes")))
    return _section("Data", "".join(parts))


def _environment(run: Run) -> str:
    if run.environment is None:
        return ""
    latest = _table(_flat(run.environment))
    if not run.starts:
        return _section("Environment", latest)
    starts = _table(map(row, run.starts), head=HEADINGS)
    return _section("Environment", f"<h3>Starts</h3>{starts}<h3>The latest</h3>{latest}")


def _notes(run: Run) -> str:
    _, unreadable, superseded = run.metrics
    notes = []
    if superseded:
        notes.append(
            f"Left out of metrics.jsonl: {counted(superseded, 'line')} of steps that were trained again after a resume."
        )
    if unreadable:
        notes.append(f"Left out of metrics.jsonl: {counted(unreadable, 'line')} torn by a crash, not readable.")
    expected = {"status.json": run.status, "config.yaml": run.config, "environment.json": run.environment}
    absent = [name for name, found in expected.items() if found is None]  # sample.txt is the demo's
    if absent:
        notes.append(f"Not in the run folder, so not on this page: {', '.join(absent)}.")
    return _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in notes)) if notes else ""


# ---- HTML ------------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(rows: Iterable[Row], head: Row = ()) -> str:
    """Rows of cells, escaped; the first cell of a row without `head` is its heading."""
    lines = ["<tr>" + "".join(f"<th>{escape(str(cell))}</th>" for cell in head) + "</tr>"] if head else []
    for first, *others in rows:
        opening = f"<td>{escape(str(first))}</td>" if head else f'<th scope="row">{escape(str(first))}</th>'
        lines.append(f"<tr>{opening}" + "".join(f"<td>{escape(str(cell))}</td>" for cell in others) + "</tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", _plain(key, value))]
    return rows


def _plain(key: str, value: object) -> object:
    """A value as it stands in YAML, a command as it is typed."""
    if key == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    if value is None or isinstance(value, bool | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).splitlines()[0]
    return value


def _values(records: list[Record], key: str) -> list[float]:
    return series(records, key)[1].tolist()
