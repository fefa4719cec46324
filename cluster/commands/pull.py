"""`hearsae pull`."""

from dataclasses import dataclass
from typing import Any

from cache.location import Location
from cluster.commands import Output
from sae.hub import pull
from sae.models import load_dictionary


@dataclass(frozen=True, kw_only=True)
class Pull(Output):
    """Download an SAE that 'hearsae push' uploaded. Nothing that is downloaded is run or unpickled."""

    repo: str
    """owner/name on the Hugging Face Hub, or ./folder."""
    out: Location
    """A new folder for it."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    def run(self) -> dict[str, Any]:
        files = pull(self.repo, self.out, revision=self.revision)
        config = load_dictionary(self.out).config
        return {"dir": str(self.out), "repo": self.repo, "files": files, "arch": config.arch, "site": config.site, "d_sae": config.d_sae}

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['dir']}: {result['arch']} of {result['site']}, {result['d_sae']} latents ({', '.join(result['files'])})"
