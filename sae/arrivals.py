"""`Arrivals`: waits for the shards of stores that are still being written."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError

from cache.errors import HearsaeError
from cache.store import ActivationStore

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 2.0
"""Between two looks for a commit record."""


class Arrivals:
    """Which shards are committed for all of some sites, and waiting for those that are not. Any thread may ask."""

    def __init__(self, stores: Sequence[ActivationStore], sites: Sequence[str], timeout_s: float) -> None:
        """timeout_s: how long a wait may last in which no shard of any store is committed."""
        self._stores, self._sites, self._timeout_s = stores, sites, timeout_s
        self._arrived: set[tuple[int, int]] = set()
        self._closing = threading.Event()

    def wait(self, number: int, shard: int) -> None:
        """Returns once a shard of store `number` is committed.

        Raises HearsaeError, saying what is missing, when nothing was committed for `timeout_s`; CancelledError after `close`.
        """
        if (number, shard) in self._arrived:
            return
        store, pause = self._stores[number], FIRST_PAUSE_S
        last_change = last_count = time.monotonic()
        committed: int | None = None
        while missing := [site for site in self._sites if not store.is_committed(site, shard)]:
            now = time.monotonic()
            if now - last_count >= self._timeout_s / 10:  # a look at all records may take long where there are many
                count = self._count()
                last_change = now if committed is not None and count != committed else last_change
                committed, last_count = count, now
            if now - last_change >= self._timeout_s:
                raise HearsaeError(
                    f"{store.path}: shard {shard} of {missing[0]} is missing, and no shard was committed in {self._timeout_s:g} s: "
                    "start 'hearsae cache' again, then this command, which goes on from its last checkpoint"
                )
            if self._closing.wait(pause):
                raise CancelledError
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
        self._arrived.add((number, shard))

    def close(self) -> None:
        """Ends every wait."""
        self._closing.set()

    def _count(self) -> int:
        return sum(len(store.committed(site)) for store in self._stores for site in self._sites)
