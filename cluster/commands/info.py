"""`hearsae info`."""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow.compute as pc
import tyro

from cache.errors import HearsaeError
from cache.location import Location
from cache.progress import StoreProgress
from cache.runs import runs
from cache.store import ActivationStore
from cluster.commands import Output, context_text, deviation_text, duration, size

LOOKING_SHARE = 10
"""Waiting is at least this many times as long as looking took."""


@dataclass(frozen=True, kw_only=True)
class Info(Output):
    """What a store holds: model, sites, clips, and how much of it is committed."""

    store: Annotated[Location, tyro.conf.Positional]
    """The store."""
    follow: bool = False
    """Go on until all is committed, or Ctrl-C: a line that renews itself on a terminal, else a line (with --json an object) for every change."""
    interval: float = 2.0
    """Seconds between two looks, with --follow. Where looking takes long, there are fewer."""

    def run(self) -> Any:
        return self._follow() if self.follow else self._look()

    def _follow(self) -> Iterator[dict[str, Any]]:
        if self.interval <= 0:
            raise HearsaeError(f"--interval {self.interval:g} must be more than 0")
        progress = StoreProgress(ActivationStore.open(self.store))
        renews = sys.__stdout__ is not None and sys.__stdout__.isatty() and not self.json
        before: dict[str, Any] = {}
        try:
            while True:
                start = time.monotonic()
                now = progress.look()
                if renews or any(now[key] != before.get(key) for key in ("committed", "skipped", "run")):
                    yield now
                before = now
                if now["committed"] == now["objects"]:
                    return
                time.sleep(max(self.interval, LOOKING_SHARE * (time.monotonic() - start)))
        except KeyboardInterrupt:
            return

    def _look(self) -> dict[str, Any]:
        store = ActivationStore.open(self.store)
        latest = runs(store, last=1)
        sites, skipped = {}, set[int]()
        for name, site in store.sites.items():
            totals = store.totals(name)
            skipped |= totals.skipped.keys()
            counts = {"committed": totals.shards, "rows": totals.rows, "bytes": totals.object_bytes}
            found = totals.deviation.deviation()
            sites[name] = {**site, "shards": store.axis(name).shards, **counts, "deviation": found and found._asdict()}
        return {
            "store": str(self.store),
            "model": store.header.model,
            "dataset": store.header.dataset,
            "clips": store.clips.num_rows,
            "hours": (pc.sum(store.clips["duration_s"]).as_py() or 0.0) / 3600,
            "skipped": len(skipped) + store.skipped_sources.num_rows,
            "dtype": store.header.dtype,
            "codec": store.header.codec,
            "context": store.header.context,
            "axes": {name: axis._asdict() for name, axis in store.header.axes.items()},
            "sites": sites,
            "software": store.header.software,
            "latest_run": latest[-1] if latest else None,
        }

    def summary(self, result: dict[str, Any]) -> str:
        if self.follow:
            return _renewing(_line(result), result["look"]) if sys.stdout.isatty() else _line(result)
        model = result["model"]
        lines = [
            f"{result['store']}: {result['clips']} clips, {result['hours']:.2f} hours, {result['skipped']} skipped",
            f"  model {model['name']} (sha256 {model['sha256'][:12]}), {result['dtype']}, compression {result['codec']}"
            f"{context_text(result['context'])}",
        ]
        for name, site in result["sites"].items():
            committed = f"{site['committed']} of {site['shards']} shards{deviation_text(site['deviation'])}"
            lines.append(f"  {name}: {site['rows']} rows of {site['width']}, one per {site['axis']}, {size(site['bytes'])}, {committed}")
        if result["latest_run"]:
            lines.append(f"  latest run: {_run_line(result['latest_run'])}")
        return "\n".join(lines)


def _line(now: dict[str, Any]) -> str:
    parts = [
        f"{now['committed']:,} of {now['objects']:,} shards and sites committed",
        f"{now['clips_complete']:,} of {now['clips']:,} clips complete",
        f"{now['rows']:,} rows",
    ]
    if now["rows_per_s"]:
        parts.append(f"{now['rows_per_s']:,.0f} rows/s")
    if now["seconds_left"]:
        parts.append(f"{duration(now['seconds_left'])} left")
    parts.append(f"{now['skipped']} clips skipped" + ("" if now["records_read"] == now["committed"] else f" in {now['records_read']:,} records read"))
    if now["run"]:
        parts.append(f"run {_run_line(now['run'])}")
    return ", ".join(parts)


def _renewing(line: str, look: int) -> str:
    """Over the line before, and no longer than the terminal is wide."""
    width = shutil.get_terminal_size().columns - 1
    return ("\x1b[1A\x1b[2K\r" if look > 1 else "") + (line if len(line) <= width else line[: width - 1] + "…")


def _run_line(run: dict[str, Any]) -> str:
    shares = run.get("seconds_by_stage") or {}
    total = sum(shares.values()) or 1.0
    of = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in shares.items() if seconds)
    return f"{run.get('state', '?')} on {run.get('host', '?')} since {run.get('started', '?')}" + (f" ({of})" if of else "")
