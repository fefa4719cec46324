"""`hearsae verify`."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cache.location import Location
from cache.store import ActivationStore, Damage
from cluster.commands import Output


@dataclass(frozen=True, kw_only=True)
class Verify(Output):
    """Read every committed object of a store and name what is damaged. Exits with 1 if anything is."""

    store: Annotated[Location, tyro.conf.Positional]
    """The store."""

    def run(self) -> dict[str, Any]:
        objects, bad = ActivationStore.open_damaged(self.store).verify()
        return {"ok": not bad, "objects": objects, "bad": [damage._asdict() for damage in bad]}

    def complaint(self, result: dict[str, Any]) -> str | None:
        if result["ok"]:
            return None
        return f"{self.store}: {len(result['bad'])} of {result['objects']} objects are damaged; 'hearsae repair {self.store}' makes room for them"

    def summary(self, result: dict[str, Any]) -> str:
        if result["ok"]:
            return f"{self.store}: all {result['objects']} objects are good"
        return "\n".join(str(Damage(**bad)) for bad in result["bad"])
