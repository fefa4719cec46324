"""`hearsae align`."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.align import Aligned, align_shard, merge, tables
from analysis.timing_files import import_jsonl
from cache import micro
from cache.errors import HearsaeError
from cache.location import Location
from cache.store import ActivationStore
from cache.timings import has_timings, write_timings
from cluster.commands import Output
from cluster.shards import reduce_shards
from cluster.workers import WorkerOptions

NAMED = 5
"""Failures that the summary names."""


@dataclass(frozen=True, kw_only=True)
class Align(Output, WorkerOptions):
    """Find when each word and phone of a store's clips is spoken, and keep the times in the store."""

    store: Location
    """The store."""
    again: bool = False
    """Replace the times that the store has."""
    import_: str | None = None
    """Take the times from a .jsonl file instead (file_name, words, phones), or 'micro' for those that come with the embedded speech."""

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        store = ActivationStore.open(self.store.absolute())
        if has_timings(store) and not self.again:
            raise HearsaeError(f"{self.store} has times of words and phones already: give --again to replace them")
        strangers: list[str] = []
        if self.import_ is None:
            method, found = "pocketsphinx", self._aligned(store)
        else:
            method = "micro" if self.import_ == "micro" else "jsonl"
            path = micro.SPEECH / "alignments.jsonl" if method == "micro" else Path(self.import_)
            found, strangers = import_jsonl(store, path)
        timings = write_timings(
            store, *tables(found), {"method": method, "phone_set": "arpabet", "suspect": sorted(found.suspect), "g2p_words": len(found.guessed)}
        )
        counts = {"clips": store.clips.num_rows, "aligned": store.clips.num_rows - len(found.failures), "failed": len(found.failures)}
        counts |= {"suspect": len(found.suspect), "words": timings.words.num_rows, "phones": timings.phones.num_rows, "g2p_words": len(found.guessed)}
        first = timings.unaligned.slice(0, NAMED).to_pylist()
        rest = {"unmatched": len(strangers), "first_unmatched": strangers[:NAMED], "first_failures": first}
        return {"store": str(self.store), "method": method, **counts, **rest, "seconds": time.perf_counter() - begin}

    def _aligned(self, store: ActivationStore) -> Aligned:
        shards = range(int(store.clips["shard"].to_numpy().max(initial=-1)) + 1)
        with tqdm(total=len(shards), desc="align", unit="shard", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            return reduce_shards(partial(align_shard, store), merge, shards, self, bar.update) or Aligned.nothing()

    def summary(self, result: dict[str, Any]) -> str:
        lines = [
            f"{result['store']}: {result['aligned']} of {result['clips']} clips have times ({result['words']} words, {result['phones']} phones), "
            f"{result['suspect']} of them suspect, in {result['seconds']:.1f} s"
        ]
        lines += [f"  clip {failure['clip']}: {failure['reason']}" for failure in result["first_failures"]]
        if result["unmatched"]:
            lines.append(f"  {result['unmatched']} names match no clip: {', '.join(result['first_unmatched'])}")
        return "\n".join(lines)
