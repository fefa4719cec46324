"""How long questions take, in this process: the first time and the best of further times, beside a plain way where there is one.

    python benchmarks/query.py --scan SCAN [--scan SCAN ...] [--site SITE] [--clip C] [--time T] [--word W] [--text REGEX] [--phone P]

The first time includes opening files and loading libraries, but the system may hold the files in memory: their pages are dropped only with --cold,
which asks the system to forget them (posix_fadvise), as it may for files that nobody else uses. Loading Python and hearsae itself is not counted;
the last lines say how long the shortest question takes as a command.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.contrast import contrast
from analysis.moments import stretch_at
from analysis.neighbours import nearest_codes, nearest_rows
from analysis.query import activation_rows, feature_moments, features_of, span_features, top_features
from analysis.scan_folder import Scan
from analysis.spoken import find_phone, find_text, find_word, timings_of
from analysis.tables import run_sql
from cache.store import ActivationStore

AGAIN = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", action="append", required=True)
    parser.add_argument("--site", help="default: that of the first scan")
    parser.add_argument("--clip", default="0")
    parser.add_argument("--time", type=float, default=1.0)
    parser.add_argument("--feature", type=int, default=0)
    parser.add_argument("--word")
    parser.add_argument("--text")
    parser.add_argument("--phone")
    parser.add_argument("--cold", action="store_true")
    asked = parser.parse_args()
    print(f"{'question':58} {'first':>8} {'again':>8}  seconds")
    for place in asked.scan:
        ask(place, asked)
    command = [sys.executable, "-m", "cluster.cli", "query", "--scan", asked.scan[0], "--feature", str(asked.feature), "--kind", "top"]
    measure("as a command: a feature's moments", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def ask(place: str, asked: argparse.Namespace) -> None:
    scan = Scan.open(place)
    store = ActivationStore.open(scan.info["store"])
    site, name, width = asked.site or scan.info["site"], Path(place).name, store.sites[scan.info["site"]]["width"]
    print(f"\n{name}: {scan.info['features']}, {scan.info['count']} features, {scan.info['rows']} rows of {width}")

    def measure_cold(what: str, answer: Callable[[], Any]) -> None:
        if asked.cold:
            forget(store.path)
        measure(what, answer)

    measure_cold("a feature's moments", lambda: feature_moments(scan, asked.feature, "top", store))
    measure_cold("  plain: pandas reads the table and picks them", lambda: by_pandas(place, store, asked.feature))
    measure_cold("opening the features", lambda: features_of(scan, store))
    features = features_of(scan, store)
    clip, time_s = asked.clip, asked.time
    measure_cold("the features of a moment", lambda: top_features(store, features, clip, time_s, scan=scan))
    measure_cold("the same by z", lambda: top_features(store, features, clip, time_s, scan=scan, by="z"))
    measure_cold("the features of half a second", lambda: span_features(store, features, clip, time_s, time_s + 0.5, scan=scan))
    measure_cold("half a second of activations", lambda: activation_rows(store, clip, time_s, time_s + 0.5, site))
    where = stretch_at(store, site, clip, time_s)
    if features.spec.startswith("sae:"):
        measure_cold("moments like one, by codes", lambda: nearest_codes(store, features, where))  # type: ignore[arg-type]
        measure_cold("  plain: every code", lambda: nearest_codes(store, features, where, every_code=True))  # type: ignore[arg-type]
    measure_cold("moments like one, by rows", lambda: nearest_rows(store, site, where))
    measure_cold("  plain: numpy over all rows", lambda: by_numpy(store, site, where.clip, where.first))
    timings = timings_of(store)
    for what, looked_for, find in (("word", asked.word, find_word), ("text", asked.text, find_text), ("phone", asked.phone, find_phone)):
        if looked_for and timings is not None:
            said = find(timings, looked_for)
            label = f"features of {what} '{looked_for}', {len(said.clip)} times in {len(np.unique(said.clip))} clips"
            measure_cold(label, lambda find=find, looked_for=looked_for: contrast(scan, store, features, find(timings, looked_for)))
    statement = f"SELECT source, value FROM examples JOIN clips USING (clip) WHERE feature = {asked.feature} AND kind = 'top' ORDER BY rank"
    measure_cold("SQL: a feature's moments, joined with clips", lambda: run_sql(statement, store, [scan]))
    measure_cold("SQL: a mean over all examples", lambda: run_sql("SELECT kind, avg(value) FROM examples GROUP BY kind", store, [scan]))


def by_pandas(place: str, store: ActivationStore, feature: int) -> pd.DataFrame:
    examples = pd.read_parquet(Path(place) / "examples.parquet")
    mine = examples[(examples.feature == feature) & (examples.kind == "top")]
    return mine.merge(pd.read_parquet(store.path / "clips.parquet", columns=["clip", "source", "speaker"]), on="clip")


def by_numpy(store: ActivationStore, site: str, clip: int, frame: int, n: int = 20) -> np.ndarray:
    """Every clip's rows, one after the other, and one sort of all cosines."""
    spans = [span for shard in store.committed(site) for span in store.spans(shard, site)]
    rows = np.concatenate([store.read_clip(site, span.clip) for span in spans]).astype(np.float32)
    rows -= rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    first = int(np.cumsum([0, *(span.stop - span.start for span in spans)])[[span.clip for span in spans].index(clip)])
    cosine = rows @ rows[first + frame] / np.maximum(np.linalg.norm(rows, axis=1), 1e-9)
    return np.argsort(-cosine)[1 : n + 1]


def measure(what: str, answer: Callable[[], Any]) -> None:
    seconds = []
    for _ in range(1 + AGAIN):
        start = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 20:
            break
    print(f"{what:58} {seconds[0]:8.3f} {min(seconds[1:], default=seconds[0]):8.3f}", flush=True)


def forget(folder: Any) -> None:
    """Asks the system to drop the pages of a folder's files from memory."""
    for parent, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


if __name__ == "__main__":
    main()
