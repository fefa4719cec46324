"""`hearsae info`."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cache.location import Location
from cache.store import ActivationStore
from cluster.commands import Output, size


@dataclass(frozen=True, kw_only=True)
class Info(Output):
    """What a store holds: model, sites, clips, and how much of it is committed."""

    store: Annotated[Location, tyro.conf.Positional]
    """The store."""

    def run(self) -> dict[str, Any]:
        store = ActivationStore.open(self.store)
        sites = {}
        for name, site in store.sites.items():
            records = [store.record(name, shard) for shard in store.committed(name)]
            sites[name] = {
                **site,
                "shards": store.axis(name).shards,
                "committed": len(records),
                "rows": sum(record.rows for record in records),
                "bytes": sum(record.object_bytes for record in records),
            }
        return {
            "store": str(self.store),
            "model": store.header.model,
            "dataset": store.header.dataset,
            "clips": store.clips.num_rows,
            "hours": sum(store.clips["duration_s"].to_pylist()) / 3600,
            "skipped": len(store.skipped(*store.sites)) + store.skipped_sources.num_rows,
            "dtype": store.header.dtype,
            "codec": store.header.codec,
            "axes": {name: axis._asdict() for name, axis in store.header.axes.items()},
            "sites": sites,
            "software": store.header.software,
        }

    def summary(self, result: dict[str, Any]) -> str:
        model = result["model"]
        lines = [
            f"{result['store']}: {result['clips']} clips, {result['hours']:.2f} hours, {result['skipped']} skipped",
            f"  model {model['name']} (sha256 {model['sha256'][:12]}), {result['dtype']}, compression {result['codec']}",
        ]
        for name, site in result["sites"].items():
            committed = f"{site['committed']} of {site['shards']} shards"
            lines.append(f"  {name}: {site['rows']} rows of {site['width']}, one per {site['axis']}, {size(site['bytes'])}, {committed}")
        return "\n".join(lines)
