"""`hearsae query`."""

from dataclasses import dataclass
from typing import Any, Literal

from analysis.features import open_features
from analysis.query import feature_moments, top_features
from analysis.scan import Scan
from cache.errors import HearsaeError
from cache.location import Location
from cache.store import ActivationStore
from cluster.commands import Output


@dataclass(frozen=True, kw_only=True)
class Query(Output):
    """Ask in either direction: `--feature N` for the moments of a feature; `--clip C --time T` for the strongest features at a moment."""

    scan: Location
    """Folder of a scan."""
    feature: int | None = None
    """Whose moments to list."""
    kind: Literal["top", "range", "quantile"] | None = None
    """Only the strongest moments, those drawn from ranges, or those drawn from quantiles."""
    clip: str | None = None
    """Number of a clip, or the name of its source."""
    time: float | None = None
    """Seconds into the source."""
    n: int = 10
    """How many features to list."""
    store: Location | None = None
    """The store, if it moved since the scan."""

    def run(self) -> dict[str, Any]:
        scan = Scan.open(self.scan)
        store = ActivationStore.open(self.store or scan.info["store"])
        if (self.feature is None) == (self.clip is None):
            raise HearsaeError("ask for --feature N, or for --clip C --time T")
        if self.feature is not None:
            return {"rows": feature_moments(scan, self.feature, self.kind, store)}
        if self.n < 1:
            raise HearsaeError(f"--n {self.n} must be at least 1")
        if self.time is None:
            raise HearsaeError("--clip needs --time, in seconds into its source")
        features = open_features(scan.info["features"], store, scan.info["options"]["seed"])
        return {"rows": top_features(store, features, self.clip or "", self.time, self.n, scan)}

    def summary(self, result: dict[str, Any]) -> str:
        rows = result["rows"]
        if not rows:
            return "this feature is never active in the scanned rows" if self.feature is not None else "no feature is active there"
        columns = [c for c in ("kind", "bin", "rank", "feature", "value", "z", "density", "source", "start_s", "frame", "text") if c in rows[0]]
        cells = [columns, *([_cell(row[c]) for c in columns] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
