"""When each word and phone of a store's clips is spoken: `words.parquet`, `phones.parquet` and what is said about them; see `docs/store.md`."""

import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import StoreError
from cache.header import crc32c, software
from cache.location import arrow_input, put
from cache.store import TIMING_TABLES, TIMINGS, ActivationStore

RECORD = TIMINGS
FORMAT = 1
SILENCE = "SIL"
"""The label of phones in which nothing is said."""

INTERVALS = pa.schema([("clip", pa.int64()), ("start_s", pa.float64()), ("end_s", pa.float64()), ("label", pa.string())])
"""Columns of words and phones. Seconds within the clip's source, as `start_s` of clips.parquet; sorted by clip and start_s."""
UNALIGNED = pa.schema([("clip", pa.int64()), ("reason", pa.string())])
FILES = dict(zip(TIMING_TABLES, (INTERVALS, INTERVALS, UNALIGNED), strict=True))
"""Each file's columns."""


class Timings(NamedTuple):
    """The times of a store's words and phones."""

    words: pa.Table
    """Columns of `INTERVALS`; label: the word as the transcript spells it."""
    phones: pa.Table
    """Columns of `INTERVALS`; label: ARPAbet in upper case without stress, `SIL` for silence (unless info's phone_set is "other")."""
    unaligned: pa.Table
    """`clip`, `reason`: the clips without times."""
    info: dict[str, Any]
    """alignment.json: format, method, phone_set, clips, failed, software, files (name -> CRC32C)."""


def has_timings(store: ActivationStore) -> bool:
    """Whether `read_timings` will find something; not whether it is sound."""
    return (store.path / RECORD).exists()


def read_timings(store: ActivationStore) -> Timings:
    """The store's timings, each file checked against its CRC32C. Raises StoreError where there are none or a byte is another than was written."""
    if not has_timings(store):
        raise StoreError(f"{store.path} has no times of words and phones: run 'hearsae align --store {store.path}' first")
    try:
        info = json.loads((store.path / RECORD).read_bytes())
        tables = []
        for name, schema in FILES.items():
            if crc32c((store.path / name).read_bytes()) != info["files"][name]:
                raise ValueError(f"the CRC32C of {name} is not the one written")
            tables.append(pq.read_table(arrow_input(store.path / name)).cast(schema))
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']} instead of {FORMAT}")
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        advice = f"run 'hearsae align --store {store.path} --again'"
        raise StoreError(f"the times of words and phones in {store.path} can't be read ({error}): {advice}") from error
    return Timings(tables[0], tables[1], tables[2], info)


def write_timings(store: ActivationStore, words: pa.Table, phones: pa.Table, unaligned: pa.Table, info: dict[str, Any]) -> Timings:
    """Writes the tables, sorted, and then the record; replaces what was there.

    info: `method` and `phone_set`, and whatever else should be kept. Raises StoreError for a clip that the store does not have, and for times
    that are not finite, run backwards or are below 0.
    """
    order = [("clip", "ascending"), ("start_s", "ascending"), ("end_s", "ascending")]
    tables = {
        "words.parquet": words.select(INTERVALS.names).cast(INTERVALS).sort_by(order),
        "phones.parquet": phones.select(INTERVALS.names).cast(INTERVALS).sort_by(order),
        "unaligned.parquet": unaligned.select(UNALIGNED.names).cast(UNALIGNED).sort_by("clip"),
    }
    for name, table in tables.items():
        _refuse_impossible(name, table, store.clips.num_rows)
    (store.path / RECORD).unlink(missing_ok=True)  # no reader may take the old record for one of the new tables
    files = {}
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = memoryview(sink.getvalue())
        put(store.path / name, data)
        files[name] = crc32c(data)
    counts = {"clips": store.clips.num_rows, "failed": unaligned.num_rows}
    full = {"format": FORMAT, **info, **counts, "software": software(), "files": files}
    put(store.path / RECORD, json.dumps(full).encode())
    return Timings(tables["words.parquet"], tables["phones.parquet"], tables["unaligned.parquet"], full)


def _refuse_impossible(name: str, table: pa.Table, clips: int) -> None:
    clip = table["clip"].to_numpy()
    if len(clip) and not 0 <= clip.min() <= clip.max() < clips:
        raise StoreError(f"{name} would name a clip that the store does not have: it has clips 0 to {clips - 1}")
    if "start_s" in table.column_names:
        start, end = table["start_s"].to_numpy(), table["end_s"].to_numpy()
        if not (np.isfinite(start) & np.isfinite(end) & (start >= 0) & (end >= start)).all():
            raise StoreError(f"{name} would have times that are not finite, below 0, or run backwards")
