"""`hearsae repair`."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cache.location import Location
from cache.store import TIMING_TABLES, TIMINGS, ActivationStore, Damage
from cluster.commands import Output


@dataclass(frozen=True, kw_only=True)
class Repair(Output):
    """Drop the records of what is damaged, so that the same 'hearsae cache' command (or 'hearsae align') makes it again."""

    store: Annotated[Location, tyro.conf.Positional]
    """The store."""

    def run(self) -> dict[str, Any]:
        return {"dropped": [damage._asdict() for damage in ActivationStore.open_damaged(self.store).repair()]}

    def summary(self, result: dict[str, Any]) -> str:
        if not result["dropped"]:
            return f"{self.store}: nothing to repair"
        lines = [f"  {Damage(**bad)}" for bad in result["dropped"]]
        timings = [bad["site"] in (TIMINGS, *TIMING_TABLES) for bad in result["dropped"]]
        again = " and ".join([*(["the 'hearsae cache' command"] if not all(timings) else []), *(["'hearsae align'"] if any(timings) else [])])
        return "\n".join([f"{self.store}: dropped {len(lines)}; run {again} again to make them", *lines])
