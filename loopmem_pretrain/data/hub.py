"""Rows of a Hugging Face data set, streamed through `datasets`, resumable at any row."""

import json
import logging
from collections.abc import Generator
from typing import Any

from loopmem_pretrain.config.prepare import SourceConfig
from loopmem_pretrain.data.corpus import Cursor, Row
from loopmem_pretrain.errors import DataError


def hub_rows(source: SourceConfig, start: Cursor) -> Generator[Row]:
    """Stream the rows of a data set from `start` on.

    Raises:
        DataError: no network, no such data set, configuration, split or field, or the stream broke.
    """
    import datasets
    import datasets.exceptions
    import httpx
    import pyarrow

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry twice; the error says it once
    label = "/".join(part for part in (source.name, source.config, source.split) if part)
    failures = (
        OSError,
        ValueError,
        RuntimeError,
        httpx.HTTPError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    )
    try:
        stream: Any = datasets.load_dataset(
            str(source.name),
            source.config,
            split=source.split,
            revision=source.revision,
            data_files=list(source.data_files) or None,
            streaming=True,
        )
        if start.state:
            stream.load_state_dict(json.loads(start.state))
    except failures as error:
        raise DataError(
            f"the data set {label} cannot be opened: {_one_line(error)}",
            "check name, config, split and revision, the network (or HF_HUB_OFFLINE), and `hf auth login` for a gated "
            "data set; without a network, download its files elsewhere and read them with kind: files",
        ) from error
    row = start.line
    rows = iter(stream)
    try:
        for record in rows:
            row += 1
            state = json.dumps(stream.state_dict())
            yield Row(record, f"{label}: row {row:,}", Cursor(0, row, row, state=state))
    except failures as error:
        raise DataError(
            f"reading the data set {label} broke after row {row:,}: {_one_line(error)}",
            "check the network and run the same command again: it continues from the last finished shard",
        ) from error
    finally:
        del rows  # a half-read parquet stream hangs the process at exit


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
