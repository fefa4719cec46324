"""How far a store is that others are writing: cheap enough to be looked at again and again, whatever its size."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cache.header import read_header
from cache.runs import runs
from cache.store import ActivationStore

RATE_SECONDS = 60
RECORDS_PER_LOOK = 200
"""A record is read once, for the clips that it skipped, and so many at most at a time; all else comes from the names of records."""


class StoreProgress:
    """`look()` again and again. One look lists the records of each site and reads the header and a few records."""

    def __init__(self, store: ActivationStore, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._clock = clock
        self._looks = 0
        self._changes: deque[tuple[float, int]] = deque()
        self._read: set[tuple[str, int]] = set()
        self._skipped: set[int] = set()
        shard = store.clips["shard"].to_numpy()
        columns = {"frame": "n_frames", "token": "n_tokens"}
        of_clip = {axis: store.clips[columns[axis]].fill_null(0).to_numpy() for axis in store.header.axes}
        n_shards = store.header.axes["frame"].shards
        self._rows = {axis: np.bincount(shard, weights=rows, minlength=n_shards).astype(int) for axis, rows in of_clip.items()}
        self._clips = np.bincount(shard, minlength=n_shards)

    def look(self) -> dict[str, Any]:
        """What is committed now.

        `objects`, `committed`: pairs of a site and a shard. `clips_complete`: of shards that every site has. `rows`, `rows_planned`: of all
        sites; of the committed shards, those of skipped clips counted too. `rows_per_s`: over the last minute, or since the commit before
        it; None until there were two. `seconds_left` at that rate. `skipped`: clips named by the `records_read` so far. `run`: of the
        latest run file, or None.
        """
        self._looks += 1
        store = self.store
        store.header = read_header(store.path)  # another run may have added sites
        done = {site: store.committed(site) for site in store.sites}
        rows = {site: self._rows[store.sites[site]["axis"]] for site in store.sites}
        complete = set.intersection(*map(set, done.values())) if done else set()
        now_rows = sum(int(rows[site][shards].sum()) for site, shards in done.items())
        planned = sum(int(of_site.sum()) for of_site in rows.values())
        rate = self._rate(now_rows)
        self._read_some([(site, shard) for site, shards in done.items() for shard in shards])
        latest = runs(store, last=1)
        return {
            "store": str(store.path),
            "look": self._looks,
            "objects": sum(len(of_site) for of_site in rows.values()),
            "committed": sum(map(len, done.values())),
            "sites": {site: {"shards": len(rows[site]), "committed": len(shards)} for site, shards in done.items()},
            "clips": store.clips.num_rows,
            "clips_complete": int(self._clips[sorted(complete)].sum()),
            "rows": now_rows,
            "rows_planned": planned,
            "rows_per_s": rate,
            "seconds_left": (planned - now_rows) / rate if rate else None,
            "skipped": len(self._skipped),
            "records_read": len(self._read),
            "run": latest[-1] if latest else None,
        }

    def _rate(self, rows: int) -> float | None:
        now = self._clock()
        if not self._changes or self._changes[-1][1] != rows:
            self._changes.append((now, rows))
        # Shards may take longer than the minute: then the commit before it is where counting begins.
        while len(self._changes) > 2 and self._changes[1][0] <= now - RATE_SECONDS:
            self._changes.popleft()
        first, rows_then = self._changes[0]
        return (rows - rows_then) / (now - first) if len(self._changes) > 1 and now > first and rows > rows_then else None

    def _read_some(self, committed: list[tuple[str, int]]) -> None:
        reader = ActivationStore(self.store.path, self.store.header)  # a store keeps the records that it read: this one does not last
        for site, shard in [pair for pair in committed if pair not in self._read][:RECORDS_PER_LOOK]:
            self._skipped |= {skip.clip for skip in reader.record(site, shard).skipped}
            self._read.add((site, shard))
