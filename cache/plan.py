"""From the headers of a dataset to the address of every row, before anything runs.

Sources are cut into clips, clips are shuffled with a seed and packed whole into shards of a fixed number of rows. The plan
depends on the data and the settings alone, never on the number of workers: same input, same plan, same addresses.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache.errors import HearsaeError

SAMPLES_PER_FRAME = 320
LARGEST_SHARD_ROWS = 65536
LONGEST_SOURCE_HOURS = 24 * 31
"""More comes from a damaged header, or a duration in the wrong unit."""
SHARDS_TO_SHARE = 32
"""A set too small for this many of the largest shards gets smaller ones, so that there are enough to share out."""


class Axis(NamedTuple):
    """The layout of an axis, `frame` or `token`."""

    shard_rows: int
    chunk_rows: int
    shards: int


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One audio file or dataset row whose header could be read."""

    source: str
    source_row: int
    n_samples: int
    """At 16 kHz."""
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    offset_samples: int = 0
    """Where it begins within the source, at 16 kHz."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Every further column that the source had."""


@dataclass(frozen=True, slots=True)
class SkippedSource:
    """One audio file or dataset row that is no readable audio."""

    source: str
    source_row: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every clip and its address. Columns of `clips` and `skipped`: `docs/store.md`."""

    clips: pa.Table
    skipped: pa.Table
    axes: dict[str, Axis]
    seed: int
    clip_seconds: float

    def summary(self) -> dict[str, Any]:
        """What identifies the plan in a store's header."""
        return {
            "clips": self.clips.num_rows,
            "skipped_sources": self.skipped.num_rows,
            "seed": self.seed,
            "clip_seconds": self.clip_seconds,
            "hash": plan_hash(self),
        }


RESERVED = ("clip", "shard", "row_start", "n_frames", "token_start", "n_tokens", "source", "source_row", "start_s", "duration_s",
            "text", "source_text", "tokens", "speaker", "language")  # fmt: skip


def make_plan(
    items: Iterable[SourceItem | SkippedSource],
    *,
    clip_seconds: float = 30.0,
    shard_rows: int | None = None,
    chunk_rows: int = 4096,
    seed: int = 0,
    shuffle: bool = True,
    tokenize: Callable[[str, str | None], Sequence[int]] | None = None,
) -> Plan:
    """Plans a run.

    clip_seconds: longest clip, at most 30; longer sources are cut, the last piece is shorter.
    shard_rows: frames per shard, a multiple of `chunk_rows`; None chooses from the data.
    shuffle: False keeps the order of the sources (streams, which can't be read in another).
    tokenize: (text, language) -> decoder input of a clip; None plans no token axis.

    Raises HearsaeError where there is nothing to plan or the settings contradict each other.
    """
    if not SAMPLES_PER_FRAME / 16000 <= clip_seconds <= 30:
        raise HearsaeError(f"--clip-seconds {clip_seconds:g} is not between 0.02 and 30, Whisper's window")
    if chunk_rows < 1:
        raise HearsaeError(f"--chunk-rows {chunk_rows} must be at least 1")
    if shard_rows is not None and (shard_rows < 1 or shard_rows % chunk_rows):
        raise HearsaeError(f"--shard-rows {shard_rows} is not a positive multiple of --chunk-rows {chunk_rows}")
    if seed < 0:
        raise HearsaeError(f"--seed {seed} is negative")
    clip_samples = round(clip_seconds * 16000)

    sources: list[SourceItem] = []
    skipped: list[SkippedSource] = []
    for item in items:
        if isinstance(item, SkippedSource):
            skipped.append(item)
        elif item.n_samples < 1:
            skipped.append(SkippedSource(item.source, item.source_row, "it has no samples"))
        elif item.n_samples > LONGEST_SOURCE_HOURS * 3600 * 16000:
            hours = item.n_samples / (3600 * 16000)
            skipped.append(
                SkippedSource(item.source, item.source_row, f"it announces {hours:.3g} hours: no more than {LONGEST_SOURCE_HOURS} are read")
            )
        else:
            sources.append(item)
    if not sources:
        reasons = "; ".join(f"{item.source}: {item.reason}" for item in skipped[:3])
        raise HearsaeError("the dataset has no readable audio" + (f" ({reasons})" if reasons else ""))

    n_pieces = np.array([-(-item.n_samples // clip_samples) for item in sources])
    of_source = np.repeat(np.arange(len(sources)), n_pieces)
    piece = np.arange(len(of_source)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    total = np.array([item.n_samples for item in sources])[of_source]
    start = piece * clip_samples
    n_samples = np.minimum(clip_samples, total - start)
    if shuffle:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(of_source))
        of_source, start, n_samples, total = of_source[order], start[order], n_samples[order], total[order]
    n_frames = -(-n_samples // SAMPLES_PER_FRAME)
    if shard_rows is None:
        shard_rows = choose_shard_rows(int(n_frames.sum()), int(n_frames.max()), chunk_rows)
    if n_frames.max() > shard_rows:
        raise HearsaeError(f"--shard-rows {shard_rows} is less than one clip of {n_frames.max()} frames")
    shard, row_in_shard = pack(n_frames, shard_rows)
    axes = {"frame": Axis(shard_rows, chunk_rows, int(shard[-1]) + 1)}

    whole = n_samples == total
    start_s = (start + np.array([item.offset_samples for item in sources])[of_source]) / 16000
    texts = [sources[i].text if is_whole else None for i, is_whole in zip(of_source, whole, strict=True)]
    tokens = [list(tokenize(t, sources[i].language)) if t and tokenize else None for t, i in zip(texts, of_source, strict=True)]
    n_tokens = np.array([len(t) if t else 0 for t in tokens])
    token_start = np.zeros(len(n_tokens), dtype=np.int64)
    if n_tokens.any():
        in_shard = np.bincount(shard, weights=n_tokens, minlength=axes["frame"].shards).astype(np.int64)
        token_chunk = min(chunk_rows, max(64, 1 << int(in_shard.max() - 1).bit_length()))
        token_rows = -(-int(in_shard.max()) // token_chunk) * token_chunk
        axes["token"] = Axis(token_rows, token_chunk, axes["frame"].shards)
        token_start = shard * token_rows + np.cumsum(n_tokens) - n_tokens - (np.cumsum(in_shard) - in_shard)[shard]

    columns: dict[str, Any] = {
        "clip": pa.array(np.arange(len(shard)), pa.int64()),
        "shard": pa.array(shard, pa.int64()),
        "row_start": pa.array(shard * shard_rows + row_in_shard, pa.int64()),
        "n_frames": pa.array(n_frames, pa.int64()),
        "token_start": pa.array(token_start, pa.int64(), mask=n_tokens == 0),
        "n_tokens": pa.array(n_tokens, pa.int64(), mask=n_tokens == 0),
        "source": pa.array([sources[i].source for i in of_source], pa.string()),
        "source_row": pa.array([sources[i].source_row for i in of_source], pa.int64()),
        "start_s": pa.array(start_s, pa.float64()),
        "duration_s": pa.array(n_samples / 16000, pa.float64()),
        "text": pa.array(texts, pa.string()),
        "source_text": pa.array([sources[i].text for i in of_source], pa.string()),
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "speaker": pa.array([sources[i].speaker for i in of_source], pa.string()),
        "language": pa.array([sources[i].language for i in of_source], pa.string()),
    }
    for name in dict.fromkeys(key for item in sources for key in item.extra):
        kept = f"source_{name}" if name in RESERVED else name
        columns[kept] = _column([sources[i].extra.get(name) for i in of_source])
    skipped_table = pa.table(
        {
            "source": pa.array([item.source for item in skipped], pa.string()),
            "source_row": pa.array([item.source_row for item in skipped], pa.int64()),
            "reason": pa.array([item.reason for item in skipped], pa.string()),
        }
    )
    return Plan(pa.table(columns), skipped_table, axes, seed, clip_seconds)


def choose_shard_rows(rows: int, longest_clip: int, chunk_rows: int) -> int:
    """Frames per shard for a set of `rows` frames: 65,536 for large sets, less for small ones; a multiple of `chunk_rows`."""
    wanted = min(LARGEST_SHARD_ROWS, max(rows // SHARDS_TO_SHARE, longest_clip, chunk_rows))
    return -(-wanted // chunk_rows) * chunk_rows


def pack(lengths: np.ndarray, shard_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole clips into shards, in order: a clip that does not fit opens the next shard. Returns shard and row within it, both [clips]."""
    ends = np.cumsum(lengths)
    shard = np.zeros(len(lengths), dtype=np.int64)
    row = np.zeros(len(lengths), dtype=np.int64)
    first, number = 0, 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        after = int(np.searchsorted(ends, before + shard_rows, side="right"))
        shard[first:after] = number
        row[first:after] = ends[first:after] - lengths[first:after] - before
        first, number = after, number + 1
    return shard, row


def plan_hash(plan: Plan) -> str:
    """SHA-256 over every address, every source and every decoder input of a plan."""
    digest = hashlib.sha256()
    for name in ("shard", "row_start", "n_frames", "token_start", "n_tokens", "source_row", "start_s", "duration_s"):
        digest.update(np.ascontiguousarray(plan.clips[name].fill_null(-1).to_numpy()).tobytes())
    for name in ("source", "tokens"):
        digest.update(json.dumps(plan.clips[name].to_pylist()).encode())
    return digest.hexdigest()


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        if not _has_empty_struct(column.type):
            return column
    except (pa.ArrowException, OverflowError):
        pass
    # A column of mixed types, of numbers without end, or of what Parquet lacks, stays readable as text.
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _has_empty_struct(kind: pa.DataType) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not inner) or any(map(_has_empty_struct, inner))
