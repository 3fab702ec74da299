"""Whether a folder, begun or complete, was made from the recipe, tokenizer and sources at hand."""

from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.data.corpus import find_files
from loopmem_pretrain.data.files import Progress, sha256_file
from loopmem_pretrain.data.journal import JOURNAL_NAME, Header, Journal, SourceFile
from loopmem_pretrain.data.manifest import MANIFEST_NAME, Manifest, Source
from loopmem_pretrain.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from loopmem_pretrain.errors import DataError

_SHOWN = 10  # differences in a message
_FREE = ("num_processes", "max_broken_lines", "output_dir", "tokenizer")  # change no byte, or are compared by hash


def source_files(config: PrepareConfig) -> list[list[Path]]:
    """Files of each source in reading order; none for a hub data set. Raises as `find_files`."""
    return [find_files(source) if source.kind == "files" else [] for source in config.sources]


def refuse_foreign_folder(folder: Path, tokenizer: str) -> None:
    """See that nothing is in the folder but what a preparation has put there.

    Before its journal is written that is a tokenizer, and the folder of its jobs.

    Raises:
        DataError: other files, and neither a journal nor a manifest that says what they are.
    """
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists() or (folder / JOURNAL_NAME).exists():
        return
    own = {"tokenizer", "slurm"}
    if Path(tokenizer).expanduser().absolute().is_relative_to(folder.absolute()):
        own.add(Path(tokenizer).expanduser().absolute().relative_to(folder.absolute()).parts[0])
    others = sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("."))
    if others:
        raise DataError(
            f"output_dir {folder} holds other things, such as {', '.join(others[:3])}, and neither a manifest nor a "
            "journal of an earlier preparation",
            "name a folder that is empty or not there yet",
        )


def begin_or_continue(
    config: PrepareConfig,
    journal: Journal,
    files: list[list[Path]],
    tokenizer: Tokenizer,
    pool: Executor,
    progress: Progress,
) -> list[SourceFile]:
    """Write the journal's first line, or see that it still describes recipe, tokenizer and sources.

    Without a finished shard there is nothing of another recipe in the folder, but the tokenizer: a recipe that was
    corrected begins anew.

    Returns:
        The files as they are now; one whose content is what it was may have another time than in the journal.

    Raises:
        DataError: with every difference, old -> new.
    """
    recipe, folder = config.model_dump(mode="json"), journal.path.parent
    paths, old = [path for group in files for path in group], journal.header
    known = {}
    if old is not None:
        different = _tokenizer_difference(old.tokenizer_sha256, old.eos_id, tokenizer)
        if journal.entries:
            before = {file.path: file.bytes for group in old.files for file in group}
            different = _differences(old.recipe, recipe) + different + _file_differences(before, paths)
        _refuse(different, folder, "begun")
        known = {(file.path, file.mtime_ns): file.sha256 for group in old.files for file in group}
    known |= _hash_files([path for path in paths if _key(path) not in known], pool, progress)
    now = tuple(tuple(_describe(path, known) for path in group) for group in files)
    if old is None or not journal.entries:
        journal.begin(Header(recipe=recipe, tokenizer_sha256=tokenizer.sha256, eos_id=tokenizer.eos_id, files=now))
        return [file for group in now for file in group]
    hashes = {file.path: file.sha256 for group in old.files for file in group}
    changed = [f"{file.path}: other content" for group in now for file in group if hashes[file.path] != file.sha256]
    _refuse(changed, folder, "begun")
    return [file for group in now for file in group]


def check_complete(config: PrepareConfig, manifest: Manifest, folder: Path) -> None:
    """See that a complete folder was made from this recipe. Tokenizer and sources may be gone by now.

    Raises:
        DataError: with every difference, old -> new.
    """
    now = config.model_dump(mode="json")
    different = _differences(manifest.recipe, now)
    trained, to_train = (_leaves(_training(recipe), "tokenizer.train") for recipe in (manifest.recipe, now))
    if trained and to_train:  # a tokenizer that is given may have been trained by another recipe
        different += _changed(trained, to_train)
    given = find_tokenizer(config.tokenizer.path)
    if given is not None:
        tokenizer = load_tokenizer(given, config.tokenizer.eos_token)
        different += _tokenizer_difference(manifest.tokenizer.sha256, manifest.tokenizer.eos_id, tokenizer)
    before = {source.path: source.bytes or 0 for source in manifest.source if source.sha256 is not None}
    if not different and any(Path(path).exists() for path in before):
        different = _file_differences(before, [path for group in source_files(config) for path in group])
    _refuse(different, folder, "made")


def refuse_changed_sources(files: Iterable[SourceFile]) -> None:
    """See that no file has changed since `begin_or_continue`: the manifest will say that the shards are of it.

    Raises:
        DataError: naming every file that has.
    """
    changed = [f"{file.path}: changed or removed" for file in files if not _is_as_before(file)]
    if changed:
        raise DataError(
            "sources were not left alone while they were read\n  " + "\n  ".join(changed),
            "when they are written, delete the output_dir and prepare it again: shards may hold parts of both",
        )


def _is_as_before(file: SourceFile) -> bool:
    try:
        found = Path(file.path).stat()
        if (found.st_mtime_ns, found.st_size) == (file.mtime_ns, file.bytes):
            return True
        return found.st_size == file.bytes and sha256_file(Path(file.path)) == file.sha256  # touched, or copied anew
    except OSError:
        return False


def source_records(config: PrepareConfig, header: Header) -> list[Source]:
    """What was read, for the manifest."""
    records = []
    for source, group in zip(config.sources, header.files, strict=True):
        about = {"origin": source.origin, "license": source.license}
        if source.kind == "hub":
            name = "/".join(part for part in (source.name, source.config, source.split) if part)
            records.append(Source(path=name, bytes=None, sha256=None, revision=source.revision, **about))
        for file in group:
            records.append(Source(path=file.path, bytes=file.bytes, sha256=file.sha256, revision=None, **about))
    return records


def _refuse(different: list[str], folder: Path, verb: str) -> None:
    if different:
        shown = different[:_SHOWN] + [f"and {len(different) - _SHOWN:,} more"] * (len(different) > _SHOWN)
        raise DataError(
            f"{folder} was {verb} from something else (old -> new)\n  " + "\n  ".join(shown),
            "choose another output_dir, restore what differs, or delete the folder to prepare it anew",
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return _changed(_leaves(_relevant(old)), _leaves(_relevant(new)))


def _changed(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {left.get(key, 'unset')} -> {right.get(key, 'unset')}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, "unset") != right.get(key, "unset")
    ]


def _relevant(recipe: dict[str, Any]) -> dict[str, Any]:
    tokenizer = recipe.get("tokenizer")
    eos_token = tokenizer.get("eos_token") if isinstance(tokenizer, dict) else None
    return {**{key: value for key, value in recipe.items() if key not in _FREE}, "tokenizer.eos_token": eos_token}


def _training(recipe: dict[str, Any]) -> dict[str, Any]:
    tokenizer = recipe.get("tokenizer")
    train = tokenizer.get("train") if isinstance(tokenizer, dict) else None
    return train if isinstance(train, dict) else {}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in _leaves(inner, f"{prefix}.{key}".lstrip(".")).items()}


def _tokenizer_difference(sha256: str, eos_id: int | None, now: Tokenizer) -> list[str]:
    if sha256 != now.sha256:
        return [f"tokenizer's sha256: {sha256} -> {now.sha256}"]
    # With Hugging Face tokenizers another file, tokenizer_config.json, may say which token ends a document.
    return [f"id that ends a document: {eos_id} -> {now.eos_id}"] if eos_id not in (None, now.eos_id) else []


def _file_differences(before: dict[str, int], paths: list[Path]) -> list[str]:
    now = {str(path): path.stat().st_size for path in paths}
    if list(before) != list(now) and sorted(before) == sorted(now):
        return ["the files are read in another order"]
    return [
        f"{path}: {_size(before.get(path))} -> {_size(now.get(path))}"
        for path in dict.fromkeys([*before, *now])
        if before.get(path) != now.get(path)
    ]


def _size(size: int | None) -> str:
    return "not read" if size is None else f"{size:,} bytes"


def _key(path: Path) -> tuple[str, int]:
    return str(path), path.stat().st_mtime_ns


def _hash_files(paths: list[Path], pool: Executor, progress: Progress) -> dict[tuple[str, int], str]:
    keys, sizes, hashes = [_key(path) for path in paths], [path.stat().st_size for path in paths], {}
    done, total = 0, sum(sizes)
    try:
        for key, size, sha256 in zip(keys, sizes, pool.map(sha256_file, paths), strict=True):
            hashes[key] = sha256
            done += size
            progress(done, total, {"stage": "hash sources"})
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}", "check the file, its disk and its permissions"
        ) from error
    return hashes


def _describe(path: Path, hashes: dict[tuple[str, int], str]) -> SourceFile:
    key = _key(path)
    if key not in hashes:
        raise DataError(f"{path} changed while it was read", "wait until the file is written, then run again")
    return SourceFile(path=str(path), bytes=path.stat().st_size, mtime_ns=key[1], sha256=hashes[key])
