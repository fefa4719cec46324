"""`hearsae import`."""

from dataclasses import dataclass
from typing import Any

from cache.errors import HearsaeError
from cache.location import Location
from cache.model import load_model
from cache.sites import all_sites
from cluster.commands import Output
from cluster.commands.export import Format
from sae.interop import Named, import_dictionary, save_imported
from sae.models import SaeConfig

UNIT_TOLERANCE = 1e-3
"""Of decoder norms around 1: what is left of it after training in half precision."""


@dataclass(frozen=True, kw_only=True)
class Import(Output):
    """Read an SAE or transcoder of another library: the same codes and reconstructions. What hearsae has nothing for is refused.

    Its rows must be those of hearsae's stores: the site's activations as they are.
    """

    format: Format
    """Library that saved it."""
    source: Location
    """The folder with its files."""
    out: Location
    """A new folder for the SAE."""
    site: str = ""
    """The site whose rows it takes. An export of hearsae says it itself."""
    target: str = ""
    """The site that it reconstructs (transcoders only)."""
    model: str | None = None
    """The Whisper whose activations it was trained on, a name or a checkpoint file: its SHA-256 is kept, and its sites are checked."""

    def run(self) -> dict[str, Any]:
        model = load_model(self.model, "cpu") if self.model else None
        named = Named(self.site, self.target, model.sha256 if model else "")
        dictionary = import_dictionary(self.format, self.source, named)
        config = dictionary.config
        if model:
            _check_sites(config, model.dims_dict, model.name)
        save_imported(dictionary, self.out)
        norms = dictionary.decoder_norms()
        return {
            "dir": str(self.out),
            "format": self.format,
            "arch": config.arch,
            "kind": config.kind,
            "site": config.site,
            "target": config.target,
            "d_in": config.d_in,
            "d_out": config.out_width,
            "d_sae": config.d_sae,
            "k": config.k,
            "model_sha256": config.model_sha256,
            "decoder_norms": [float(norms.min()), float(norms.max())],
        }

    def summary(self, result: dict[str, Any]) -> str:
        what = f"{result['arch']} {result['kind'].replace('sae', 'SAE')} of {result['site']}"
        to = f" to {result['target']}" if result["target"] else ""
        lines = [f"{result['dir']}: {what}{to}, {result['d_in']} -> {result['d_sae']} latents"]
        least, most = result["decoder_norms"]
        if max(1 - least, most - 1) > UNIT_TOLERANCE:
            lines.append(f"  its decoder's rows are {least:.3g} to {most:.3g} long: values of its latents are in units of their own")
        if not result["model_sha256"]:
            lines.append("  its model is not known, without which 'hearsae scan' takes no SAE: name it with --model")
        return "\n".join(lines)


def _check_sites(config: SaeConfig, dims: dict[str, int], model: str) -> None:
    """Raises HearsaeError if the model has no such site, or it has another width."""
    widths = {site.name: site.width for site in all_sites(dims)}
    for site, width in ((config.site, config.d_in), (config.targets[0], config.out_width)):
        if site not in widths:
            raise HearsaeError(f"{model} has no site '{site}': sites are named as in 'hearsae cache --sites'")
        if widths[site] != width:
            raise HearsaeError(f"{site} of {model} has width {widths[site]}, and this SAE {width}: it is of another site or another model")
