"""`hearsae query`."""

import csv
import io
import time
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from analysis.moments import stretch_at
from analysis.phone_answers import has_phone_table, phone_features
from analysis.query import Rows, activation_rows, feature_moments, feature_rows, feature_tokens, features_of, span_features, top_features
from analysis.scan_folder import Scan
from analysis.spoken import Said, find_phone, find_text, find_word, timings_of
from analysis.tokens import marked
from analysis.written_rows import ENDINGS, frame_rows, save_rows
from cache.errors import HearsaeError
from cache.location import Location
from cache.store import ActivationStore
from cluster.commands import Output

QUESTIONS = {
    "feature": ("kind",),
    "tokens": ("feature", "following", "n"),
    "phone": ("n",),
    "word": ("n",),
    "text": ("n",),
    "like": ("clip", "time", "frame", "site", "n", "one_per_clip", "exclude_same_clip", "uncentred"),
    "rows": ("clip", "from_", "to", "site", "save"),
    "sql": ("csv",),
    "clip": ("time", "frame", "from_", "to", "by", "over", "n"),
}
"""Flag that asks -> flags that go with it, besides --scan, --store and --json. A clip or feature may be part of another question."""
ASK = (
    "ask for --feature N, or for --clip C --time T (or --from T --to T), or for --phone P, --word W, --text REGEX, --like, --tokens, --rows or "
    "--sql; "
    "--help says what each is"
)
COLUMNS = (
    "kind", "bin", "rank", "cosine", "feature", "auc", "auc_moved", "auc_shuffled", "log_odds", "value", "z", "rate_inside", "rate_outside",
    "density", "source", "start_s", "frame", "frames", "phone", "word", "token", "next_token", "text",
)  # fmt: skip
"""For people, in this order, where an answer has them; --json has all."""
TOKEN_COLUMNS = ("feature", "token", "next_token", "count", "examples", "mean", "max")
"""The same of counted tokens."""
CONTEXT = 24
"""Characters shown before a token, and after it."""


@dataclass(frozen=True, kw_only=True)
class Query(Output):
    """Ask about a scan or a store: the moments of a feature, the features of a moment or of a phone, word or text, moments like another, rows, SQL.

    --feature N: its moments. --clip C --time T, or --from T --to T: the strongest features there. --phone P, --word W, --text REGEX: the features
    that fire there more than elsewhere. --tokens, of a decoder site: the features whose strongest examples are of one token; with --feature N all
    tokens of its strongest examples. --like --clip C --time T: the frames most like that one. --rows --clip C --from T --to T: activations.
    --sql "SELECT ...": anything about clips, words, phones, features, examples, coactivation, phone_scores, phone_auc, phone_counts.
    """

    scan: tuple[Location, ...] = ()
    """Folder of a scan; with --sql, of several."""
    store: Location | None = None
    """The store; default: where it was when it was scanned."""
    feature: int | None = None
    """Whose moments to list."""
    kind: Literal["top", "range", "quantile", "bottom"] | None = None
    """Only the strongest moments, those drawn from ranges, those drawn from quantiles, or the most negative ones."""
    clip: str | None = None
    """Number of a clip, or the name of its source."""
    time: float | None = None
    """Seconds into the source."""
    frame: int | None = None
    """Frame of the clip, instead of --time; of a decoder site, the token."""
    from_: Annotated[float | None, tyro.conf.arg(name="from")] = None
    """Start of a span, in seconds into the source."""
    to: float | None = None
    """Its end."""
    by: Literal["value", "z"] = "value"
    """Order features by their value, or by how unusual it is among all rows of the scan."""
    over: Literal["mean", "max"] = "mean"
    """What of a feature's values over a span counts."""
    phone: str | None = None
    """A phone (or, where the scan has phone evidence, a class of phones)."""
    word: str | None = None
    """A word, whatever its case."""
    text: str | None = None
    """A regular expression (RE2) over the words of each clip, with one space between."""
    tokens: bool = False
    """Of a decoder site: count the tokens of the strongest examples."""
    following: bool = False
    """Count the tokens that come next instead, which the decoder is about to write."""
    like: bool = False
    """Moments like the one of --clip and --time: by the SAE's codes (--scan), or by the rows of a --site."""
    one_per_clip: bool = False
    """Only the best moment of every clip."""
    exclude_same_clip: bool = False
    """No moment of the clip itself."""
    uncentred: bool = False
    """Compare a site's rows as they are. Default: less their mean, which else makes all of them alike."""
    rows: bool = False
    """The activations themselves, of --site, or the values of the features of --scan."""
    site: str | None = None
    """A site of the store."""
    save: Location | None = None
    """File for the activations: .npy, .npz or .parquet."""
    sql: str | None = None
    """One SELECT in DuckDB's SQL."""
    csv: bool = False
    """Print the answer of --sql as CSV."""
    n: int = 10
    """How many features or moments to list."""

    def run(self) -> dict[str, Any]:
        question = self._question()
        if self.n < 1:
            raise HearsaeError(f"--n {self.n} must be at least 1")
        if self.save is not None and self.save.suffix not in ENDINGS:
            raise HearsaeError(f"--save {self.save}: give a name that ends in {', '.join(ENDINGS)}")
        if question == "sql":
            return self._sql()
        if len(self.scan) > 1:
            raise HearsaeError("give one --scan: only --sql takes several")
        scan = Scan.open(self.scan[0]) if self.scan else None
        place: Location | str | None = self.store or (scan.info["store"] if scan else None)
        if place is None:
            raise HearsaeError("give --scan, or --store" if question in ("like", "rows") else "give the --scan to ask about")
        store = ActivationStore.open(place)
        if question in ("like", "rows"):
            return self._rows(scan, store) if self.rows else self._like(scan, store)
        if scan is None:
            raise HearsaeError("give the --scan to ask about")
        if question == "tokens":
            return _timed(lambda: {"rows": feature_tokens(scan, self.n, self.feature, following=self.following)})
        if question == "feature":
            return _timed(lambda: {"rows": feature_moments(scan, self.feature or 0, self.kind, store)})
        if question == "clip":
            return self._features_there(scan, store)
        return self._contrast(scan, store)

    def _question(self) -> str:
        """Which flag asks. Raises HearsaeError where none or several do, and for flags that have no part in the question."""
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default} - {"scan", "store", "json"}
        parts = {"clip": {"like", "rows"}, "feature": {"tokens"}}
        asked = [name for name in QUESTIONS if name in given and not given & parts.get(name, set())]
        if len(asked) != 1:
            raise HearsaeError(ASK)
        (question,) = asked
        for name in sorted(given - {question, *QUESTIONS[question]}):
            goes_with = " or ".join(_flag(other) for other, flags in QUESTIONS.items() if name in flags)
            raise HearsaeError(f"{_flag(name)} has no part in a question of {_flag(question)}" + (f": it goes with {goes_with}" if goes_with else ""))
        return question

    def _span(self, question: str) -> tuple[str, float, float]:
        if self.clip is None or self.from_ is None or self.to is None:
            raise HearsaeError(f"{question} needs --clip C --from T --to T, in seconds into its source")
        return self.clip, self.from_, self.to

    def _features_there(self, scan: Scan, store: ActivationStore) -> dict[str, Any]:
        clip = self.clip or ""
        one, span = (self.time is not None) + (self.frame is not None), (self.from_ is not None) + (self.to is not None)
        if (one, span) not in ((1, 0), (0, 2)):
            raise HearsaeError("--clip needs --time, in seconds into its source (or --frame, or --from and --to)")
        if span == 0 and self.over != "mean":
            raise HearsaeError("--over goes with --from and --to")
        features = features_of(scan, store)
        if span:
            from_s, to_s = self._span("--clip")[1:]
            return _timed(lambda: {"rows": span_features(store, features, clip, from_s, to_s, self.n, scan, by=self.by, over=self.over)})
        return _timed(lambda: {"rows": top_features(store, features, clip, self.time, self.n, scan, frame=self.frame, by=self.by)})

    def _contrast(self, scan: Scan, store: ActivationStore) -> dict[str, Any]:
        from analysis.contrast import contrast, top_contrast

        if self.phone is not None and has_phone_table(scan):
            phone = self.phone
            return _timed(lambda: {"rows": phone_features(scan, phone, self.n), "from": "phone_auc.parquet"})
        features = features_of(scan, store)

        def answer() -> dict[str, Any]:
            compared = contrast(scan, store, features, self._said(store))
            facts = {name: getattr(compared, name) for name in ("occurrences", "clips", "frames", "chance_auc")}
            return {"rows": top_contrast(scan, compared, self.n)} | facts

        return _timed(answer)

    def _said(self, store: ActivationStore) -> Said:
        timings = timings_of(store)
        if timings is None:
            raise HearsaeError(f"{store.path} has no times of words and phones: run 'hearsae align --store {store.path}' first")
        if self.phone is not None:
            return find_phone(timings, self.phone)
        return find_word(timings, self.word) if self.word is not None else find_text(timings, self.text or "")

    def _like(self, scan: Scan | None, store: ActivationStore) -> dict[str, Any]:
        from analysis.neighbours import nearest, nearest_rows

        if self.clip is None or (self.time is None) == (self.frame is None):
            raise HearsaeError("--like needs --clip C and --time T (or --frame F)")
        if (self.site is None) == (scan is None):
            raise HearsaeError("--like needs a --site of the --store, or a --scan, and not both")
        if self.uncentred and self.site is None:
            raise HearsaeError("--uncentred goes with --site: codes are never centred")
        clips = {"one_per_clip": self.one_per_clip, "other_clips": self.exclude_same_clip}
        features = None if scan is None else features_of(scan, store)
        site = self.site or (features.site if features else "")
        where = stretch_at(store, site, self.clip, self.time, self.frame)
        if features is None:
            return _timed(lambda: {"rows": nearest_rows(store, site, where, self.n, centred=not self.uncentred, **clips)})
        return _timed(lambda: {"rows": nearest(store, features, where, self.n, **clips)})

    def _rows(self, scan: Scan | None, store: ActivationStore) -> dict[str, Any]:
        clip, from_s, to_s = self._span("--rows")
        if (self.site is None) == (scan is None):
            raise HearsaeError("--rows needs a --site of the --store, or a --scan for the values of its features, and not both")
        features = None if scan is None else features_of(scan, store)

        def answer() -> dict[str, Any]:
            found: Rows = (
                feature_rows(store, clip, from_s, to_s, features) if features else activation_rows(store, clip, from_s, to_s, self.site or "")
            )
            frames = frame_rows(found, store.header.frame_seconds)
            facts = {"shape": list(found.values.shape), "dtype": str(found.values.dtype)}
            if self.save is not None:
                save_rows(self.save, found)
                return {"rows": frames, "saved": str(self.save)} | facts
            return {"rows": [row | {"values": values} for row, values in zip(frames, found.values.tolist(), strict=True)]} | facts

        return _timed(answer)

    def _sql(self) -> dict[str, Any]:
        from analysis.tables import run_sql

        scans = [Scan.open(place) for place in self.scan]
        stores = {scan.info["store"] for scan in scans}
        if not scans and self.store is None:
            raise HearsaeError("--sql needs a --store, or a --scan or several")
        if self.store is None and len(stores) > 1:
            raise HearsaeError(f"these are scans of several stores: say with --store whose clips to ask about ({', '.join(sorted(stores))})")
        store = ActivationStore.open(self.store or stores.pop())

        def answer() -> dict[str, Any]:
            found = run_sql(self.sql or "", store, scans)
            return {"rows": found.rows, "columns": list(found.columns)}

        return _timed(answer)

    def summary(self, result: dict[str, Any]) -> str:
        if self.csv:
            return _csv(result["columns"], result["rows"])
        return "\n".join(part for part in (self._head(result), self._body(result), f"{result['seconds']:.3f} s") if part)

    def _head(self, result: dict[str, Any]) -> str:
        if "chance_auc" in result:
            return (
                f"{result['frames']} frames of {result['occurrences']} stretches in {result['clips']} clips; "
                f"the best feature by chance has AUC {result['chance_auc']:.3f}"
            )
        if "shape" in result:
            saved = f" -> {result['saved']}" if "saved" in result else ""
            return f"{result['shape'][0]} frames x {result['shape'][1]}, {result['dtype']}{saved}"
        return ""

    def _body(self, result: dict[str, Any]) -> str:
        rows = result["rows"]
        if self.sql is not None:
            return _table(result["columns"], rows)
        if not rows:
            return "this feature is never active in the scanned rows" if self.feature is not None else "no feature is active there"
        if self.rows:
            shown = [row | {"values": _first(row.get("values", ()))} for row in rows[: self.n]]
            return _table(["frame", "start_s", *(["values"] if "values" in rows[0] else [])], shown) + ("\n..." if len(rows) > self.n else "")
        if "token_start" in rows[0]:
            rows = [row | {"text": marked(row["text"], row["token_start"], row["token_end"], CONTEXT)} for row in rows]
        return _table([c for c in (TOKEN_COLUMNS if self.tokens else COLUMNS) if c in rows[0]], rows)


def _timed(answer: Any) -> dict[str, Any]:
    start = time.perf_counter()
    return answer() | {"seconds": time.perf_counter() - start}


def _flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def _table(columns: list[str], rows: list[dict[str, Any]]) -> str:
    cells = [columns, *([_cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[c] for c in columns] for row in rows)
    return text.getvalue().removesuffix("\n")


def _first(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values[:6]) + (" ..." if len(values) > 6 else "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
