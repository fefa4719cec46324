"""`hearsae align`."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from analysis.align import Aligned, align_shard, merge, tables
from analysis.timing_export import Format, export_times, refuse_full
from analysis.timing_files import Imported, import_times
from cache import micro
from cache.errors import HearsaeError
from cache.location import Location
from cache.store import ActivationStore
from cache.timings import Timings, has_timings, read_timings, write_timings
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
    import_: Annotated[tuple[str, ...], tyro.conf.arg(name="import", metavar="FILE")] = ()
    """Take the times from files instead, matched by the sources' names: TextGrids (tiers words and phones) or folders of them, .ctm files (phones
    where the name has 'phone' in it, or as phones:FILE; else words), .jsonl files (file_name, words, phones). micro: those of the embedded speech."""
    export: Location | None = None
    """Write the times to files in this new folder. A store that has times keeps them."""
    format: Format = "textgrid"
    """What --export writes."""

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        store = ActivationStore.open(self.store.absolute())
        result: dict[str, Any] = {"store": str(self.store)}
        if self.export is not None:
            refuse_full(self.export)  # before there is work to lose
        if self.export is not None and has_timings(store) and not (self.again or self.import_):
            timings = read_timings(store)
        else:
            timings, more = self._made(store)
            result |= more
        if self.export is not None:
            result |= {"export": str(self.export), "format": self.format, "sources": export_times(store, timings, self.export, self.format)}
        return {**result, "seconds": time.perf_counter() - begin}

    def _made(self, store: ActivationStore) -> tuple[Timings, dict[str, Any]]:
        """The times that were found or imported, written to the store; and what there is to say."""
        if has_timings(store) and not self.again:
            raise HearsaeError(f"{self.store} has times of words and phones already: give --again to replace them")
        if self.import_:
            found, method, phone_set, strangers = self._imported(store)
        else:
            found, method, phone_set, strangers = Imported(self._aligned(store), "pocketsphinx", "arpabet", [])
        lists = {"suspect": sorted(found.suspect), "retried": sorted(found.retried), "g2p_words": len(found.guessed)}
        timings = write_timings(store, *tables(found), {"method": method, "phone_set": phone_set, **lists})
        counts = {"clips": store.clips.num_rows, "aligned": store.clips.num_rows - len(found.failures), "failed": len(found.failures)}
        counts |= {"suspect": len(found.suspect), "retried": len(found.retried), "words": timings.words.num_rows, "phones": timings.phones.num_rows}
        rest = {"unmatched": len(strangers), "first_unmatched": strangers[:NAMED], "first_failures": timings.unaligned.slice(0, NAMED).to_pylist()}
        return timings, {"method": method, "phone_set": phone_set, **counts, "g2p_words": len(found.guessed), **rest}

    def _imported(self, store: ActivationStore) -> Imported:
        if "micro" not in self.import_:
            return import_times(store.clips, list(self.import_))
        if len(self.import_) > 1:
            raise HearsaeError("--import micro stands alone")
        return import_times(store.clips, [str(micro.SPEECH / "alignments.jsonl")])._replace(method="micro")

    def _aligned(self, store: ActivationStore) -> Aligned:
        shards = range(int(store.clips["shard"].to_numpy().max(initial=-1)) + 1)
        with tqdm(total=len(shards), desc="align", unit="shard", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            return reduce_shards(partial(align_shard, store), merge, shards, self, bar.update) or Aligned.nothing()

    def summary(self, result: dict[str, Any]) -> str:
        lines = []
        if "clips" in result:
            lines.append(
                f"{result['store']}: {result['aligned']} of {result['clips']} clips have times ({result['words']} words, {result['phones']} phones), "
                f"{result['suspect']} of them suspect, in {result['seconds']:.1f} s"
            )
            lines += [f"  clip {failure['clip']}: {failure['reason']}" for failure in result["first_failures"]]
            if result["unmatched"]:
                lines.append(f"  {result['unmatched']} names match no clip: {', '.join(result['first_unmatched'])}")
        if "export" in result:
            lines.append(f"wrote the times of {result['sources']} sources to {result['export']}")
        return "\n".join(lines)
