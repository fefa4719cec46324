"""Questions with quick answers, in both directions: when is a feature active, and which features are active at a time.

Where the store has timings (`hearsae align`), a moment comes with the word and the phone that are said in the middle of its frame.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.moments import Stretch, read_stretch, stretch_at, stretch_between
from analysis.scan_folder import KINDS, Scan
from analysis.spoken import labels_at, said_between, timings_of
from cache.errors import HearsaeError
from cache.store import ActivationStore

if TYPE_CHECKING:
    from analysis.features import Features

By = Literal["value", "z"]
Over = Literal["mean", "max"]
NO_WORD = re.compile(r"<\|.*\|>|\W*")
"""A token of the start sequence, or punctuation: nearly every transcript has them."""


class Rows(NamedTuple):
    """Some frames of a clip with all their values."""

    where: Stretch
    values: np.ndarray
    """[frames, width]: a site's as stored (float16 or float32), features' as float32."""
    start_s: np.ndarray
    """float64 [frames]: when each frame starts, within the clip's source."""


# From a feature to its moments


def feature_moments(scan: Scan, feature: int, kind: str | None = None, store: ActivationStore | None = None) -> list[dict[str, Any]]:
    """A feature's examples, the top ones first: `kind, bin, rank, value, clip, source, frame, start_s, end_s, text, speaker`.

    Where the store has timings also `word` and `phone`, each None where none is said.
    kind: only those of one kind.
    store: the store that was scanned; default: where it was then. It knows sources, speakers and timings.
    Raises HearsaeError for a feature or kind that does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise HearsaeError(f"there are no examples of kind '{kind}': use one of {', '.join(reversed(KINDS))}")
    store = store or ActivationStore.open(scan.info["store"])
    rows = [row for row in scan.examples(feature).to_pylist() if kind in (None, row["kind"])]
    rows.sort(key=lambda row: -KINDS.index(row["kind"]))
    if any(not 0 <= row["clip"] < store.clips.num_rows for row in rows):
        raise HearsaeError(f"{store.path} is not the store of the scan {scan.path}: the scan names clips that it does not have")
    clips = store.clips.select(["source", "speaker"]).take(pa.array([row["clip"] for row in rows], pa.int64())).to_pylist()
    return _with_labels(store, [row | clip for row, clip in zip(rows, clips, strict=True)])


def feature_tokens(scan: Scan, n: int = 10, feature: int | None = None, *, following: bool = False) -> list[dict[str, Any]]:
    """Which tokens the strongest examples of a decoder site's features are, whatever their case: `feature, token, count, examples, mean, max`.

    count: of the feature's `examples` top examples, at most one a clip, those at this token; mean and max are of their values.
    feature: its n most frequent tokens. None: the n features that are most of one word, each with that word's token; features that are most of
        punctuation or of the start sequence, which nearly every transcript has, are passed over.
    following: `next_token` in place of `token`, which the decoder is about to write; the end of a transcript has none.
    Raises HearsaeError for a scan that does not know tokens and a feature that does not exist.
    """
    if scan.info["axis"] != "token":
        raise HearsaeError(f"{scan.path} is a scan of {scan.info['site']}, which has frames, not tokens")
    examples = scan.all_examples() if feature is None else scan.examples(feature)
    name = "next_token" if following else "token"
    if name not in examples.column_names:
        raise HearsaeError(f"{scan.path} does not say which tokens its examples are: run 'hearsae scan' again")
    examples = examples.filter(pc.equal(examples["kind"].cast(pa.string()), "top"))
    in_all = Counter(examples["feature"].to_pylist())
    columns = {"feature": examples["feature"], name: pc.utf8_lower(pc.utf8_trim_whitespace(examples[name])), "value": examples["value"]}
    known = pa.table(columns).filter(pc.is_valid(columns[name]))
    counted = known.group_by(["feature", name]).aggregate([("value", kind) for kind in ("count", "mean", "max")]).to_pylist()
    rows = [
        {"feature": row["feature"], name: row[name], "count": row["value_count"], "examples": in_all[row["feature"]]}
        | {"mean": row["value_mean"], "max": row["value_max"]}
        for row in counted
    ]
    rows.sort(key=lambda row: (-row["count"], row["examples"], -row["mean"], row["feature"], row[name]))
    if feature is not None:
        return rows[:n]
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["feature"], row)
    return [row for row in best.values() if not NO_WORD.fullmatch(row[name])][:n]


def _with_labels(store: ActivationStore, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = timings_of(store)
    if timings is None:
        return rows
    clips = [row["clip"] for row in rows]
    middles = [None if row["start_s"] is None else (row["start_s"] + row["end_s"]) / 2 for row in rows]
    words, phones = (labels_at(segments, clips, middles) for segments in (timings.words, timings.phones))
    return [row | {"word": word, "phone": phone} for row, word, phone in zip(rows, words, phones, strict=True)]


# From a moment to its features


def top_features(
    store: ActivationStore,
    features: "Features",
    clip: int | str,
    time_s: float | None = None,
    n: int = 10,
    scan: Scan | None = None,
    *,
    frame: int | None = None,
    by: By = "value",
) -> list[dict[str, Any]]:
    """The `n` strongest features at a moment, strongest first: `feature, value, clip, source, frame, start_s, end_s`.

    clip: a clip's number, or the name of its source (whole, or its last part).
    time_s: time within the clip's source, as `start_s` of an example; or
    frame: frame within the clip; on the token axis, where there is no time, a token's index.
    scan: a scan of the same features; adds `z`, the value against all rows of the scan in standard deviations (None for a feature that
        never varies), and `density`.
    by: `value`: the largest positive values; `z`: the most unusual ones above the feature's mean, which needs a scan.
    Where the store has timings also `word` and `phone`; on the token axis also `token`, and its time where that is known.
    Raises HearsaeError for a clip that is unknown, ambiguous, skipped or not cached, and for a moment that is not in it.
    """
    where = stretch_at(store, features.site, clip, time_s, frame)
    return _strongest(store, features, where, n, scan, by, "max")


def span_features(
    store: ActivationStore,
    features: "Features",
    clip: int | str,
    from_s: float,
    to_s: float,
    n: int = 10,
    scan: Scan | None = None,
    *,
    by: By = "value",
    over: Over = "mean",
) -> list[dict[str, Any]]:
    """The `n` strongest features of a span of time: as `top_features`, but `value` is the mean or the maximum over the span's frames.

    from_s, to_s: within the clip's source; every frame that the span touches counts. `frame` is the first one, `frames` how many there are.
    `z` is in standard deviations of single frames: neighbouring frames are alike, so it is no test of significance.
    Where the store has timings also `word` and `phone`: all that the span touches, with spaces between.
    Raises HearsaeError as `top_features` does, and for a span that is empty, or longer than its clip.
    """
    where = stretch_between(store, features.site, clip, from_s, to_s)
    return _strongest(store, features, where, n, scan, by, over)


def _strongest(store: ActivationStore, features: "Features", where: Stretch, n: int, scan: Scan | None, by: By, over: Over) -> list[dict[str, Any]]:
    if scan is not None:
        _refuse_other_features(scan, features, store)
    elif by == "z":
        raise HearsaeError("z is a value against those of all rows: that needs a scan")
    frames = features.dense(read_stretch(store, features.site, where))
    value = frames.max(axis=0) if over == "max" else frames.mean(axis=0, dtype=np.float64)
    columns: dict[str, np.ndarray] = {"value": value}
    if scan is not None:
        mean, std, density = (scan.features[name].to_numpy() for name in ("mean", "std", "density"))
        with np.errstate(divide="ignore", invalid="ignore"):
            columns |= {"z": np.where(std > 0, (value - mean) / std, np.nan), "density": density}
    rank = np.where(columns[by] > 0, columns[by], -np.inf)  # NaN too
    strongest = [i for i in np.argsort(-rank, kind="stable")[:n].tolist() if rank[i] > 0]
    place = {"clip": where.clip, "source": where.source, "frame": where.first, "start_s": where.start_s, "end_s": where.end_s}
    place |= {"frames": len(frames)} if len(frames) > 1 else {}
    place |= _said(store, where) | _token(store, features.site, where)
    return [{"feature": i} | {name: _number(column[i]) for name, column in columns.items()} | place for i in strongest]


def _token(store: ActivationStore, site: str, where: Stretch) -> dict[str, Any]:
    """On the token axis what the token is, and when it is said where that is known."""
    if store.sites[site]["axis"] != "token":
        return {}
    from analysis.tokens import tokens_of

    ((_, tokens),) = tokens_of(store, [where.clip])
    token = tokens[where.first]
    return {"token": token.token, "start_s": token.start_s, "end_s": token.end_s}


def _said(store: ActivationStore, where: Stretch) -> dict[str, str | None]:
    timings = timings_of(store)
    if timings is None:
        return {}
    if where.start_s is None or where.end_s is None:
        return {"word": None, "phone": None}
    if where.stop - where.first == 1:
        middle = (where.start_s + where.end_s) / 2
        return {"word": labels_at(timings.words, [where.clip], [middle])[0], "phone": labels_at(timings.phones, [where.clip], [middle])[0]}
    word, phone = (" ".join(said_between(segments, where.clip, where.start_s, where.end_s)) for segments in (timings.words, timings.phones))
    return {"word": word or None, "phone": phone or None}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _refuse_other_features(scan: Scan, features: "Features", store: ActivationStore) -> None:
    if scan.info["features"] != features.spec:
        raise HearsaeError(f"{scan.path} is a scan of {scan.info['features']}, not of {features.spec}")
    if scan.info["model"]["sha256"] != store.header.model["sha256"]:
        raise HearsaeError(f"{scan.path} is a scan of another model than that of {store.path}")


# From a span of time to its rows


def activation_rows(store: ActivationStore, clip: int | str, from_s: float, to_s: float, site: str) -> Rows:
    """The activations of a span of time: the frames that it touches, as they are stored.

    clip, from_s, to_s: as in `span_features`. Raises HearsaeError as that does, and for a site that the store does not have.
    """
    where = stretch_between(store, site, clip, from_s, to_s)
    return Rows(where, read_stretch(store, site, where), _starts(store, where))


def feature_rows(store: ActivationStore, clip: int | str, from_s: float, to_s: float, features: "Features") -> Rows:
    """The same as the values of features, float32 [frames, features]."""
    where = stretch_between(store, features.site, clip, from_s, to_s)
    return Rows(where, features.dense(read_stretch(store, features.site, where)), _starts(store, where))


def _starts(store: ActivationStore, where: Stretch) -> np.ndarray:
    return store.clips["start_s"][where.clip].as_py() + store.header.frame_seconds * np.arange(where.first, where.stop)


# The features of a scan


class StoredNeurons:
    """`analysis.features.Neurons` for a few rows, without loading torch, which takes longer than the question."""

    def __init__(self, site: str, width: int) -> None:
        self.spec = f"neurons:{site}"
        self.site = site
        self.count = width

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, count]."""
        return rows.astype(np.float32)

    def sparse(self, rows: np.ndarray) -> None:
        """None: most values are nonzero."""
        return None


def features_of(scan: Scan, store: ActivationStore) -> "Features":
    """What was scanned, to be asked about rows of the store. Raises HearsaeError as `analysis.features.open_features` does."""
    kind, _, site = scan.info["features"].partition(":")
    if kind == "neurons" and site in store.sites:
        return StoredNeurons(site, store.sites[site]["width"])
    from analysis.features import open_features

    return open_features(scan.info["features"], store, scan.info["options"]["seed"])
