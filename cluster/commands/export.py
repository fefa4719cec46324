"""`hearsae export`."""

from dataclasses import dataclass
from typing import Any, Literal

from cache.location import Location
from cluster.commands import Output
from sae.interop import export_dictionary
from sae.models import load_dictionary

Format = Literal["saelens", "dictionary_learning", "sparsify"]


@dataclass(frozen=True, kw_only=True)
class Export(Output):
    """Write a trained SAE as another library reads it: the same codes and reconstructions. What a format can't hold is refused."""

    sae: Location
    """Folder of the trained SAE."""
    format: Format
    """Library that is to read it."""
    out: Location
    """A new folder for its files."""

    def run(self) -> dict[str, Any]:
        dictionary = load_dictionary(self.sae)
        files = export_dictionary(dictionary, self.format, self.out)
        config = dictionary.config
        return {"dir": str(self.out), "format": self.format, "arch": config.arch, "kind": config.kind, "site": config.site, "files": files}

    def summary(self, result: dict[str, Any]) -> str:
        kind = result["kind"].replace("sae", "SAE")
        return f"{result['dir']}: {result['arch']} {kind} of {result['site']} for {result['format']} ({', '.join(result['files'])})"
