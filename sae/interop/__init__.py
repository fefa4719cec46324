"""Dictionaries in the formats of other libraries: SAELens, dictionary_learning and sparsify.

A conversion keeps the function: the same codes and the same reconstruction, to the rounding of float32. What a format can't hold is refused.
Where a format has a place for metadata, hearsae's own config travels there, and comes back with an import: site, model, stores, rows, scale.
docs/interop.md says what becomes what.
"""

from types import ModuleType

from cache.errors import HearsaeError
from cache.location import Location, location, names_in, put
from sae.interop import dictionary_learning, saelens, sparsify
from sae.interop.parts import Named
from sae.models import CONFIG, WEIGHTS, Dictionary

__all__ = ["FORMATS", "Named", "export_dictionary", "import_dictionary", "save_imported"]

FORMATS: dict[str, ModuleType] = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}
"""name -> module with `files(dictionary) -> {file name: its bytes}` and `read(folder, named) -> Dictionary`."""


def export_dictionary(dictionary: Dictionary, form: str, folder: str | Location) -> list[str]:
    """Writes a dictionary as `form` (one of `FORMATS`) reads it; returns the names of the files.

    Raises HearsaeError for what the format can't hold, and for a folder that holds anything else: names of files are shared between formats.
    """
    if dictionary.config.kind == "crosscoder":
        raise HearsaeError(f"this is a crosscoder of {dictionary.config.site}: no format of another library holds one")
    files = _format(form).files(dictionary)
    _write(location(folder), files)
    return sorted(files)


def import_dictionary(form: str, folder: str | Location, named: Named | None = None) -> Dictionary:
    """Reads what `form` (one of `FORMATS`) saved in a folder. Tensors are read with safetensors or `weights_only`: nothing is run.

    named: what the format does not say; where hearsae's own config travelled along, it must agree.
    Raises HearsaeError if there is no such dictionary, it is damaged, or hearsae has nothing that computes the same.
    """
    return _format(form).read(location(folder), named or Named()).requires_grad_(False)


def save_imported(dictionary: Dictionary, folder: str | Location) -> None:
    """Saves as `Dictionary.save` does, but raises HearsaeError for a folder that holds anything else."""
    _check_free(location(folder), {CONFIG, WEIGHTS})
    dictionary.save(folder)


def _format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise HearsaeError(f"there is no format '{name}'; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def _write(folder: Location, files: dict[str, bytes]) -> None:
    _check_free(folder, set(files))
    for name, data in files.items():
        put(folder / name, data)


def _check_free(folder: Location, names: set[str]) -> None:
    others = sorted(set(names_in(folder)) - names)
    if others:
        raise HearsaeError(f"{folder} holds other files ({others[0]}): give a new folder")
