"""`hearsae phones`."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import tyro

from analysis.evidence import PhoneEvidence
from analysis.explorer.export import parse_features
from analysis.phone_figure import save_mix
from analysis.phone_table import F1_LEVELS, LEVELS, MOST_P, most_polysemantic, phone_rows, strongest, summary
from analysis.scan import Scan
from cache.errors import HearsaeError
from cache.location import Location, put
from cluster.commands import Output

SHOWN = 20
"""Features listed where none are asked for."""
COLUMNS = {
    "feature": "feature",
    "phone": "phone",
    "auc": "AUC (95 %)",
    "auc_shuffled": "shuffled",
    "f1": "F1",
    "onset_ms": "onset ms",
    "phone_class": "class",
    "class_auc": "AUC",
    "polysemanticity": "polysemanticity (95 %)",
    "phones_at_top": "phones at top",
    "ranges": "from high to low activation",
}
"""Of the table, and their headings."""
WITH_ENDS = ("auc", "polysemanticity")
LUCK_P = 0.05


@dataclass(frozen=True, kw_only=True)
class Phones(Output):
    """Which phone each feature follows, how surely, and what else it responds to at lower activation."""

    scan: Annotated[Location, tyro.conf.Positional]
    """Folder of a scan whose store has phone times."""
    features: str | None = None
    """Which features to list: '0-99,512'; default: the 20 that tell their phone best."""
    polysemantic: int | None = None
    """List so many features whose phones most clearly change with activation, instead."""
    feature: int | None = None
    """The feature of --figure."""
    figure: Path | None = None
    """Draw which phones are said in each range of its activation: FILE.png or FILE.svg."""
    out: Path | None = None
    """Write the listed rows, with all columns: FILE.csv or FILE.parquet."""

    def run(self) -> dict[str, Any]:
        if (self.feature is None) != (self.figure is None):
            raise HearsaeError("--feature N and --figure FILE.png go together")
        if self.features is not None and self.polysemantic is not None:
            raise HearsaeError("--features and --polysemantic exclude each other")
        if self.polysemantic is not None and self.polysemantic < 1:
            raise HearsaeError(f"--polysemantic {self.polysemantic} must be at least 1")
        evidence = PhoneEvidence.open(Scan.open(self.scan))
        rows = phone_rows(evidence, self._listed(evidence))
        if self.out is not None:
            _write(rows, self.out)
        if self.figure is not None and self.feature is not None:
            save_mix(evidence.mix(self.feature), _title(evidence, self.feature), self.figure)
        written = {name: str(path) for name, path in (("out", self.out), ("figure", self.figure)) if path is not None}
        return {"rows": rows, "summary": summary(evidence), **written}

    def _listed(self, evidence: PhoneEvidence) -> list[int]:
        if self.features is not None:
            return parse_features(self.features, evidence.scan.info["count"]).tolist()
        if self.polysemantic is not None:
            return most_polysemantic(evidence, self.polysemantic)
        return [self.feature] if self.feature is not None else strongest(evidence, SHOWN)

    def summary(self, result: dict[str, Any]) -> str:
        table = [list(COLUMNS.values()), *([_cell(row, name) for name in COLUMNS] for row in result["rows"])]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        if any(_by_chance(row) for row in result["rows"]):
            lines.append(f"?: no better than shuffled labels would be (p > {LUCK_P})")
        if self.figure is None:
            lines += ["", *_counts(result["summary"])]
        lines += [f"wrote {result[name]}" for name in ("out", "figure") if name in result]
        return "\n".join(lines)


def _by_chance(row: dict[str, Any]) -> bool:
    return row["phone"] is not None and (row["p_value"] is None or row["p_value"] > LUCK_P)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "phone" and _by_chance(row):
        return f"{value} ?"
    if not isinstance(value, float):
        return str(value)
    shown = f"{value:.0f}" if name == "onset_ms" else f"{value:.1f}" if name == "phones_at_top" else f"{value:.2f}"
    if name not in WITH_ENDS or row[f"{name}_lo"] is None:
        return shown
    return f"{shown} ({row[f'{name}_lo']:.2f}-{row[f'{name}_hi']:.2f})"


def _counts(found: dict[str, Any]) -> list[str]:
    names = {
        "auc": "best phone",
        "auc_active": "best phone, values below 0 as 0",
        "class_auc": "best class",
        "auc_shuffled": "best phone, shuffled labels",
    }
    lines = [f"of {found['features']} features, AUC above {' / above '.join(map(str, LEVELS))}:"]
    lines += [f"  {words}: {_above(found[name], LEVELS)}" for name, words in names.items()]
    covered = f"phones with such a feature: {len(found['phones_covered'])}"
    lines.append(f"  F1 above {' / above '.join(map(str, F1_LEVELS))}: {_above(found['f1'], F1_LEVELS)}; {covered}")
    change = "" if found["polysemanticity_median"] is None else f"; their median polysemanticity {found['polysemanticity_median']:.2f}"
    lines.append(f"  better than shuffled labels with p <= {MOST_P}: {found['significant']}{change}")
    return lines


def _above(counts: dict[str, Any], levels: tuple[float, ...]) -> str:
    median, largest = ("-" if counts[key] is None else f"{counts[key]:.2f}" for key in ("median", "max"))
    return f"{' / '.join(str(counts[f'above_{level}']) for level in levels)}; median {median}, largest {largest}"


def _title(evidence: PhoneEvidence, feature: int) -> str:
    (row,) = evidence.scores.slice(feature, 1).to_pylist()
    kind, _, name = evidence.scan.info["features"].partition(":")
    named = f"{kind} {PurePosixPath(name).name}, feature {feature}"
    if row["phone"] is None:
        return named
    shuffled = "" if row["auc_shuffled"] is None else f" (shuffled {row['auc_shuffled']:.2f})"
    change = "" if row["polysemanticity"] is None else f", polysemanticity {row['polysemanticity']:.2f}"
    return f"{named}\n{row['phone']}, AUC {row['auc']:.2f}{shuffled}{change}"


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    writers = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}
    if path.suffix not in writers:
        raise HearsaeError(f"can't write {path}: its name must end in {' or '.join(writers)}")
    if not rows:
        raise HearsaeError(f"there is nothing to write to {path}: no feature was found")
    sink = pa.BufferOutputStream()
    writers[path.suffix](pa.Table.from_pylist(rows), sink)
    put(path, memoryview(sink.getvalue()))
