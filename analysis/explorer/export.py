"""`export`: one or more scans as a folder of static files, a page that works from the file system and from any web server.

- index.html: the page; its looks and its code are in assets/
- explorer.json: says that the folder is ours, and what it was made of
- data/index.js: the scans
- data/clips.js: the clips that examples refer to
- data/scan0/list.js: one row a feature, for the list
- data/scan0/block0.js, ...: the histograms, examples and traces of 16 features
- data/scan0/clip/0.js, ...: the strongest features over one clip
- data/audio/0.js, ...: one clip's audio
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.explorer.clip_pages import Ranked, pack_said, write_clip_page
from analysis.explorer.clips import AUDIO, Clips, Use, clip_texts, write_clips
from analysis.explorer.datafiles import histogram, numbers, pack, sparkline, write_data
from analysis.explorer.evidence_data import PhoneData
from analysis.explorer.folder import MARKER, copy_assets, staging_folder
from analysis.explorer.related import Related, related
from analysis.explorer.traces import Traces, cut_traces
from analysis.features import Features, open_features
from analysis.scan_folder import Scan
from cache.errors import HearsaeError
from cache.header import software
from cache.location import Location, location
from cache.store import ActivationStore
from sae.models import Codes

FORMAT = 1
FEATURES_PER_BLOCK = 16
LIST_TEXT_CHARACTERS = 160
TOKEN_CONTEXT = 16
LONGEST_CONTEXT_S = 30.0
"""Whisper's window."""
KINDS = ("top", "range", "quantile", "bottom")
NOUNS = {"neurons": "neuron", "sae": "latent", "pca": "component", "random": "direction"}

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""


@dataclass(frozen=True)
class _Part:
    """One scan on its way into the page, restricted to the features asked for."""

    name: str
    """`scan0`, ..."""
    scan: Scan
    store: ActivationStore
    table: pa.Table
    """Of features, in ascending order."""
    examples: pa.Table
    context: int
    """Frames or tokens to either side of a peak."""
    phones: PhoneData | None
    """None where the scan has no phones."""


def export(
    scans: Sequence[str | Location],
    out: str | Path,
    *,
    features: str | None = None,
    audio: str = "vorbis",
    context_s: float = 1.0,
    store: str | Location | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the page of one or more scans to `out`, a new or empty folder or one of an earlier export, which it replaces.

    features: numbers and ranges such as `0-99,512`; None takes all.
    audio: `vorbis`, `flac` (exact), or `none`.
    context_s: seconds to either side of a peak that are shown and played.
    store: where the scans' activation store is now, if it moved.

    Returns `out`, `index`, `scans`, `features`, `examples`, `clips`, `clips_without_audio`, `bytes`, `seconds`.
    Raises HearsaeError where a scan or its store is missing or does not fit, where `out` holds other things, can't be written or is full.
    """
    began = time.monotonic()
    out = Path(out)
    progress = progress or (lambda what, done, total: None)
    if not scans:
        raise HearsaeError("name at least one scan folder to explore")
    if audio not in (*AUDIO, "none"):
        raise HearsaeError(f"audio can be {', '.join(AUDIO)} or none, not '{audio}'")
    if not 0 < context_s <= LONGEST_CONTEXT_S:
        raise HearsaeError(f"a context of {context_s:g} s is not between 0 and {LONGEST_CONTEXT_S:g} s")
    stores: dict[str, ActivationStore] = {}
    parts = [_open_part(f"scan{i}", Scan.open(folder), stores, store, features, context_s) for i, folder in enumerate(scans)]
    clips = Clips([use for part in parts for use in _uses(part)])
    with staging_folder(out) as staging:
        data = staging / "data"
        for part in parts:
            features_ = open_features(part.scan.info["features"], part.store, seed=part.scan.info["options"]["seed"])
            traces = _cut(data, part, features_, clips, progress)
            _write_list(data, part)
            _write_blocks(data, part, traces, clips, related(part.scan, features_, part.table["feature"].to_numpy()))
        missing = write_clips(data, clips, pack_said(clips), audio, partial(progress, "audio"))
        write_data(data, "index", {"format": FORMAT, "scans": [_summary(part) for part in parts]})
        made_of = {
            "format": FORMAT,
            "hearsae": software()["hearsae"],
            "scans": [part.scan.path.name for part in parts],
            "features": features,
            "audio": audio,
            "context_s": context_s,
        }
        (staging / MARKER).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
        copy_assets(staging)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return {
        "out": str(out),
        "index": str(out / "index.html"),
        "scans": len(parts),
        "features": sum(part.table.num_rows for part in parts),
        "examples": sum(part.examples.num_rows for part in parts),
        "clips": len(clips),
        "clips_without_audio": missing,
        "bytes": size,
        "seconds": round(time.monotonic() - began, 2),
    }


def parse_features(wanted: str | None, count: int) -> np.ndarray:
    """`0-99,512` -> sorted feature numbers, int64; None -> all of them. Raises HearsaeError for what is no number or none of `count` features."""
    if wanted is None:
        return np.arange(count)
    chosen: set[int] = set()
    for piece in wanted.split(","):
        first, dash, last = (number.strip() for number in piece.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise HearsaeError(f"'{wanted}' names no features: write numbers and ranges, such as 0-99,512")
        low, high = int(first), int(last if dash else first)
        if not low <= high < count:
            raise HearsaeError(f"there is no feature {piece.strip()}: this scan has features 0 to {count - 1}")
        chosen.update(range(low, high + 1))
    return np.array(sorted(chosen))


# What goes in


def _open_part(
    name: str, scan: Scan, stores: dict[str, ActivationStore], moved_to: str | Location | None, wanted: str | None, context_s: float
) -> _Part:
    info = scan.info
    place = location(moved_to if moved_to is not None else info["store"]).absolute()
    path = str(place)
    if path not in stores:
        if not place.is_dir():
            moved = "there" if moved_to is not None else "there any more: say with --store where it is now"
            raise HearsaeError(f"the activation store {path} of the scan {scan.path} is not {moved}")
        stores[path] = ActivationStore.open(place)
    store = stores[path]
    if store.header.model["sha256"] != info["model"]["sha256"] or info["site"] not in store.sites:
        raise HearsaeError(f"{path} is not the store of the scan {scan.path}: it was made with another model, or has no site {info['site']}")
    numbers_ = pa.array(parse_features(wanted, info["count"]), pa.int32())
    table = scan.features.filter(pc.is_in(scan.features["feature"], numbers_)).combine_chunks()
    examples = scan.all_examples()
    examples = examples.filter(pc.is_in(examples["feature"], numbers_)).combine_chunks()
    clip = examples["clip"].to_numpy()
    if len(clip) and not 0 <= clip.min() <= clip.max() < store.clips.num_rows:
        raise HearsaeError(f"{path} is not the store of the scan {scan.path}: the scan names clips that it does not have")
    context = round(context_s / store.header.frame_seconds) if info["axis"] == "frame" else TOKEN_CONTEXT
    return _Part(name, scan, store, table, examples, max(1, context), PhoneData.of(scan))


def _uses(part: _Part) -> Iterator[Use]:
    """The clips of its examples; those are heard whose examples have a time."""
    clips = part.examples["clip"].to_numpy()
    yield Use(part.store, clips, False)
    yield Use(part.store, clips[pc.is_valid(part.examples["start_s"]).to_numpy()], True)


def _cut(data: Path, part: _Part, features: Features, clips: Clips, progress: Progress) -> Traces:
    """The examples' traces. On the frame axis it also writes the pages of the clips that they lie in, while it has their values."""
    ranked = Ranked.of(part.table)

    def write_page(clip: int, values: np.ndarray | Codes, n_rows: int) -> None:
        write_clip_page(data, f"{part.name}/clip/{clips.numbers(part.store, np.array([clip]))[0]}", ranked, values, n_rows)

    what = f"traces of {part.scan.info['features']}"
    feature, clip, position, value = (part.examples[name].to_numpy() for name in ("feature", "clip", "frame", "value"))
    report = partial(progress, what)
    return cut_traces(
        part.store, features, feature, clip, position, value, part.context, report, write_page if part.scan.info["axis"] == "frame" else None
    )


# What comes out


def _summary(part: _Part) -> dict[str, Any]:
    info = part.scan.info
    kind, _, rest = info["features"].partition(":")
    noun = NOUNS.get(kind, "feature")
    return {
        "name": part.name,
        "noun": noun,
        "source": Path(rest).name if kind == "sae" else "",
        "site": info["site"],
        "axis": info["axis"],
        "model": Path(str(info["model"].get("name"))).name,
        "store": part.store.path.name,
        "count": info["count"],
        "rows": info["rows"],
        "frame_s": part.store.header.frame_seconds,
        "context": part.context,
        "block": FEATURES_PER_BLOCK,
        "phones": part.phones.summary() if part.phones else None,
    }


def _write_list(data: Path, part: _Part) -> None:
    """The list's rows, column by column: 12,288 features make a file of about 2 MB."""
    table = part.table
    best = _strongest_texts(part)
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for text in best if text))}
    value = {
        "feature": table["feature"].to_pylist(),
        "spark": [sparkline(*fine) for fine in _fine_histograms(table)],
        "text": [texts.get(text, -1) for text in best],
        "texts": [text if len(text) <= LIST_TEXT_CHARACTERS else text[:LIST_TEXT_CHARACTERS] + "…" for text in texts],
    }
    for name in ("density", "max", "mean_active"):
        value[name] = numbers(table[name].to_pylist(), 4)
    if part.phones:
        value |= part.phones.columns(table["feature"].to_numpy())
    write_data(data, f"{part.name}/list", value)


def _strongest_texts(part: _Part) -> list[str]:
    examples = part.examples
    strongest = examples.filter(pc.and_(pc.equal(examples["kind"], "top"), pc.equal(examples["rank"], 0)))
    texts = strongest["text"].to_pylist()
    if _has_tokens(part):
        texts = [f"{token.strip()} · {text or ''}" for token, text in zip(strongest["token"].to_pylist(), texts, strict=True)]
    by_feature = dict(zip(strongest["feature"].to_pylist(), texts, strict=True))
    return [by_feature.get(feature) or "" for feature in part.table["feature"].to_pylist()]


def _fine_histograms(table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for row in range(table.num_rows):
        yield tuple(np.asarray(table[name][row].as_py() or [], np.float64) for name in ("hist_lo", "hist_hi", "hist_count"))  # type: ignore[misc]


def _write_blocks(data: Path, part: _Part, traces: Traces, clips: Clips, others: Related) -> None:
    feature = part.examples["feature"].to_numpy()
    for block in range(-(-part.table.num_rows // FEATURES_PER_BLOCK)):
        table = part.table.slice(block * FEATURES_PER_BLOCK, FEATURES_PER_BLOCK)
        shown = table["feature"].to_numpy()
        starts = np.searchsorted(feature, shown)
        first, stop = int(starts[0]), int(np.searchsorted(feature, shown[-1], side="right"))
        value = {
            "starts": [int(start) - first for start in starts] + [stop - first],
            "features": [
                _feature(row, fine) | others.of(row["feature"]) | (part.phones.of_feature(row["feature"]) if part.phones else {})
                for row, fine in zip(table.to_pylist(), _fine_histograms(table), strict=True)
            ],
            "examples": _pack_examples(part, traces, clips, slice(first, stop)),
            "texts": _own_texts(part, first, stop),
            "tokens": _tokens(part, first, stop),
        }
        write_data(data, f"{part.name}/block{block}", value)


def _feature(row: dict[str, Any], fine: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Any]:
    lo, step, counts = histogram(*fine)
    names = (
        "rows", "active", "density", "mean", "std", "mean_active", "max", "min",
        "runs", "run_frames_mean", "run_frames_median", "rise_frames_mean", "fall_frames_mean",
    )  # fmt: skip
    return dict(zip(names, numbers([row[name] for name in names]), strict=True)) | {
        "rows": row["rows"],
        "active": row["active"],
        "runs": row["runs"],
        "histogram": {"lo": lo, "step": step, "counts": counts.tolist()},
        "range_edges": numbers(row["range_edges"] or []),
        "quantile_edges": numbers(row["quantile_edges"] or []),
    }


def _pack_examples(part: _Part, traces: Traces, clips: Clips, where: slice) -> str:
    """The columns that `assets/feature.js: unpackExamples` reads, in its order."""
    examples = part.examples.slice(where.start, where.stop - where.start)
    kind = pc.index_in(examples["kind"].cast(pa.string()), pa.array(KINDS)).to_numpy()
    return pack(
        [
            examples["value"].to_numpy().astype(np.float32),
            traces.lo[where],
            traces.hi[where],
            clips.numbers(part.store, examples["clip"].to_numpy()).astype(np.uint32),
            examples["frame"].to_numpy().astype(np.uint32),
            traces.first[where],
            traces.stop[where],
            examples["bin"].to_numpy().astype(np.uint16),
            kind.astype(np.uint8),
            traces.levels[where],
        ]
    )


def _own_texts(part: _Part, first: int, stop: int) -> dict[str, str | None]:
    """The texts of examples that are not their clip's: row in the block -> text."""
    examples = part.examples.slice(first, stop - first)
    of_clips = clip_texts(part.store).take(examples["clip"]).to_pylist()
    texts = examples["text"].to_pylist()
    return {str(row): text for row, (text, of_clip) in enumerate(zip(texts, of_clips, strict=True)) if text != of_clip}


def _has_tokens(part: _Part) -> bool:
    """False on the frame axis, and of a scan from before examples had tokens."""
    return "token" in part.examples.column_names


def _tokens(part: _Part, first: int, stop: int) -> dict[str, list[Any]] | None:
    """Of each example of a block: its token, where it is in the text, and when it is said; column by column."""
    if not _has_tokens(part):
        return None
    examples = part.examples.slice(first, stop - first)
    return {name: examples[name].to_pylist() for name in ("token", "token_start", "token_end", "start_s", "end_s")}
