"""Rows of activations as a file for other programs."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.query import Rows
from cache.errors import HearsaeError
from cache.location import Location, put

ENDINGS = (".npy", ".npz", ".parquet")


def save_rows(path: Location, rows: Rows) -> None:
    """Writes a file of the kind that its name says.

    `.npy`: the values [frames, width] as they are. `.npz`: `values`, `frame`, `start_s`, `clip`, `source`.
    `.parquet`: a row a frame: `clip`, `source`, `frame`, `start_s`, `end_s`, `values` (list of float32).
    Raises HearsaeError for another ending, StoreError where it can't be written.
    """
    if path.suffix not in ENDINGS:
        raise HearsaeError(f"--save {path}: give a name that ends in {', '.join(ENDINGS)}")
    put(path, _npy(rows) if path.suffix == ".npy" else _npz(rows) if path.suffix == ".npz" else _parquet(rows))


def frame_rows(rows: Rows, frame_seconds: float) -> list[dict[str, Any]]:
    """`clip, source, frame, start_s, end_s` of each frame."""
    clip, source, first = rows.where[:3]
    return [
        {"clip": clip, "source": source, "frame": first + i, "start_s": start, "end_s": start + frame_seconds}
        for i, start in enumerate(rows.start_s.tolist())
    ]


def _npy(rows: Rows) -> bytes:
    file = io.BytesIO()
    np.save(file, rows.values, allow_pickle=False)
    return file.getvalue()


def _npz(rows: Rows) -> bytes:
    file = io.BytesIO()
    where = rows.where
    frame = np.arange(where.first, where.stop)
    np.savez(file, values=rows.values, frame=frame, start_s=rows.start_s, clip=np.int64(where.clip), source=np.array(where.source))
    return file.getvalue()


def _parquet(rows: Rows) -> memoryview:
    frames, width = rows.values.shape
    step = (rows.where.end_s - rows.where.start_s) / frames if rows.where.start_s is not None and rows.where.end_s is not None else 0.0
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.values.astype(np.float32).ravel()), width)
    table = pa.Table.from_pylist(frame_rows(rows, step)).append_column("values", values)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())
