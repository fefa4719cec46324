"""`hearsae push`."""

from dataclasses import dataclass
from typing import Any

from cache.location import Location
from cluster.commands import Output
from sae.hub import push


@dataclass(frozen=True, kw_only=True)
class Push(Output):
    """Upload a trained SAE with a model card. Beside it in its folder, plots/*.png and an export in saelens/ go along; nothing else does."""

    sae: Location
    """Folder of the trained SAE. Its README.md is the card; without one a card is made, from train.json and evaluation.json too."""
    repo: str
    """owner/name on the Hugging Face Hub (the token is that of `hf auth login` or HF_TOKEN), or ./folder."""
    license: str = ""
    """Licence that the card names, for example mit. Default: none."""
    private: bool = False
    """Makes the repository private, where it has to be made."""

    def run(self) -> dict[str, Any]:
        return {"repo": self.repo, "files": push(self.sae, self.repo, license_name=self.license, private=self.private)}

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['repo']}: {', '.join(result['files'])}"
