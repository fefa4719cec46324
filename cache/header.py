"""The header of a store: what makes it what it is, and what must agree before a run continues it."""

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import google_crc32c

from cache.errors import StoreError
from cache.location import Location
from cache.plan import Axis

FORMAT = 1
FILE, COPY = "zarr.json", "header.json"
"""A store's header and its copy, from which `repair` makes it again."""
FRAME_SECONDS = 0.02
SAMPLE_RATE = 16000
PADDED: dict[str, Any] = {"mode": "padded"}
"""The context of a store of whole windows."""


@dataclass(frozen=True)
class Header:
    """What makes a store what it is. Two runs continue one store only if all of this agrees, but for `sites` and names."""

    model: dict[str, Any]
    """`name`, `sha256` of the checkpoint file, `dims`, `has_decoder`."""
    dataset: dict[str, Any]
    """How to open the source again: see `cache.audio.open_source`."""
    axes: dict[str, Axis]
    plan: dict[str, Any]
    """`hash`, `seed`, `clips`, `skipped_sources`, `clip_seconds`."""
    dtype: str = "float16"
    codec: Literal["none", "lz4", "zstd"] = "none"
    context: dict[str, Any] = field(default_factory=lambda: dict(PADDED))
    """What the encoder heard behind a clip: `cache.context`."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Site name -> `axis`, `width`."""
    files: dict[str, str] = field(default_factory=dict)
    """CRC32C, 8 hex digits, of every file that is written once: `clips.parquet`, `skipped.parquet`, `SITE/zarr.json`."""
    format: int = FORMAT
    frame_seconds: float = FRAME_SECONDS
    sample_rate: int = SAMPLE_RATE
    software: dict[str, str] = field(default_factory=lambda: software())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"axes": {name: axis._asdict() for name, axis in self.axes.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Header":
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        return cls(**values | {"axes": {name: Axis(**axis) for name, axis in data["axes"].items()}})

    def identity(self) -> dict[str, Any]:
        """The fields that must agree, flat, in the order in which a difference is reported."""
        flat: dict[str, Any] = {"format": self.format, "model.sha256": self.model["sha256"], "model.dims": self.model["dims"]}
        flat |= {f"plan.{key}": value for key, value in self.plan.items() if key != "hash"}
        flat |= {f"axes.{name}": axis._asdict() for name, axis in self.axes.items()}
        flat |= {"dtype": self.dtype, "codec": self.codec, "context": name_of_context(self.context), "frame_seconds": self.frame_seconds}
        return flat | {"sample_rate": self.sample_rate, "plan.hash": self.plan["hash"]}


def name_of_context(context: dict[str, Any]) -> str:
    """For messages: `padded`, or `trimmed with a margin of 1 s`."""
    margin = f" with a margin of {context['margin_s']:g} s" if "margin_s" in context else ""
    return f"{context['mode']}{margin}"


def software() -> dict[str, str]:
    """Versions that can influence the stored numbers."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    for name in ("hearsae", "torch", "openai-whisper", "numpy", "zarr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return tuple(found.items())


def crc32c(data: bytes | memoryview) -> str:
    """8 hex digits."""
    return f"{google_crc32c.value(bytes(data)):08x}"


def header_bytes(header: Header) -> bytes:
    """What `zarr.json` and its copy hold."""
    return _group(header.to_json())


def _group(header: dict[str, Any]) -> bytes:
    attributes = {"hearsae": header, "crc32c": crc32c(json.dumps(header).encode())}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def read_header(path: Location, file: str = FILE) -> Header:
    """The header of the store at `path`, or its copy. Raises StoreError if there is no store, one of another format, or a damaged one."""
    damaged = f"{path / file} is damaged: run 'hearsae repair {path}'"
    try:
        text = (path / file).read_bytes()
        attributes = json.loads(text)["attributes"]
        data, has_checksum = attributes["hearsae"], "crc32c" in attributes
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"there is no activation store at {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise StoreError(damaged if (path / COPY).exists() else f"{path} is not a hearsae activation store") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise StoreError(f"{path} has store format {found}; this hearsae reads format {FORMAT}")
    if has_checksum and text != _group(data):
        raise StoreError(damaged)
    try:
        header = Header.from_json(data)
        _check(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path / file} is damaged: its header can't be read") from error
    if not has_checksum and header.files:  # a header that knows its files has a checksum
        raise StoreError(damaged)
    return header


def _check(header: Header) -> None:
    """Raises one of the errors of missing or misshapen values if the header lacks what every reader relies on."""
    header.identity()
    if not {"name", "sha256", "dims", "has_decoder"} <= header.model.keys() or not isinstance(header.dataset, dict):
        raise ValueError
    for site in header.sites.values():
        if site["axis"] not in header.axes or site["width"] < 1:
            raise ValueError
    for axis in header.axes.values():
        if min(axis) < 1 or axis.shard_rows % axis.chunk_rows:
            raise ValueError


def refuse_difference(path: Location, have: Header, want: Header) -> None:
    """Raises StoreError naming the first thing in which the store at `path` differs from what a run wants."""
    theirs, ours = have.identity(), want.identity()
    for key in theirs | ours:
        if theirs.get(key) != ours.get(key):
            there, here = _short(theirs.get(key)), _short(ours.get(key))
            raise StoreError(
                f"{path} was made otherwise: {key} is {there} there and {here} here; use another --out, or the settings it was made with"
            )


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."
