"""Where audio comes from: an audio folder, a `datasets` dataset, a JSONL manifest, or the speech that comes with hearsae.

Planning reads headers only; a clip is decoded when its shard is captured, and again when somebody wants to hear it.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache import micro
from cache.decode import decode, header_samples
from cache.errors import HearsaeError, RemoteError, SourceError
from cache.header import SAMPLE_RATE
from cache.hub import offline_without_network, quiet
from cache.location import Location, arrow_input, in_order, kept_copy, location, names_below
from cache.plan import SAMPLES_PER_FRAME, SkippedSource, SourceItem
from cache.store import ActivationStore

READABLE_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph")
UNREADABLE_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".wma")
"""Audio that libsndfile can't decode: named among the skipped, not passed over."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
LANGUAGE_COLUMNS = ("language", "lang", "locale")


class Source(Protocol):
    """A dataset of audio. Items come in a fixed order; `read` finds an item again by its (source, source_row)."""

    in_order_only: bool
    """A stream: items can be read only in the order in which they come."""

    def describe(self) -> dict[str, Any]:
        """JSON from which `reopen_source` makes the same source again; stored in the header."""

    def items(self) -> Iterator[SourceItem | SkippedSource]:
        """Every item, from its header alone."""

    def read(self, source: str, source_row: int, start_s: float, n_samples: int) -> np.ndarray:
        """float32 [n_samples], mono, 16 kHz, from `start_s`. Raises SourceError saying what is wrong with the audio."""

    def file(self, source: str, source_row: int) -> Location | None:
        """The audio file of an item; None where its audio lies inside the dataset."""


def open_source(spec: str, split: str | None = None, subset: str | None = None, streaming: bool = False) -> Source:
    """Opens what `--dataset` names: `micro`, a folder of audio, one audio file, a folder saved by `datasets`, a `.jsonl` manifest, a `.parquet` file,
    a hub dataset.

    `micro` is the speech that comes with hearsae, also where there is a folder of that name: `./micro` is the folder.
    Raises SourceError if there is nothing of the kind.
    """
    if "://" in spec:
        return _open_remote(spec, split, subset, streaming)
    path = Path(spec)
    if not spec:
        raise SourceError("--dataset names nothing")
    if spec == micro.NAME:
        return MicroSpeech(split)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return Manifest(path)
    if path.is_dir() and not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        return AudioFolder(path, split)
    if path.is_file() and path.suffix.lower() in READABLE_SUFFIXES + UNREADABLE_SUFFIXES:
        return AudioFile(path)
    if path.is_file() and path.suffix != ".parquet":
        raise SourceError(f"{spec} is neither a folder, an audio file, a .jsonl manifest nor a .parquet file")
    if not path.exists() and (path.is_absolute() or spec.startswith(".") or spec.count("/") > 1):
        raise SourceError(f"there is no dataset at {spec} (--dataset {micro.NAME} comes with hearsae)")
    return HubDataset(spec, split, subset, streaming)


def _open_remote(spec: str, split: str | None, subset: str | None, streaming: bool) -> Source:
    path = location(spec)
    if path.suffix in (".jsonl", ".json"):
        return Manifest(path)
    if path.suffix == ".parquet":
        return HubDataset(spec, split, subset, streaming)
    if path.suffix.lower() in READABLE_SUFFIXES + UNREADABLE_SUFFIXES and path.is_file():
        return AudioFile(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise SourceError(f"{spec} was saved by `datasets`, which hearsae reads from local disks only: copy it, or write it as .parquet")
    return AudioFolder(path, split)


def reopen_source(description: dict[str, Any]) -> Source:
    """The source that a store's header describes."""
    kind, values = description.get("kind"), {key: value for key, value in description.items() if key != "kind"}
    if kind == "micro":
        return MicroSpeech(**values)
    if kind == "audiofile":
        return AudioFile(location(values["path"]))
    if kind == "audiofolder":
        return AudioFolder(location(values["root"]), values["split"])
    if kind == "manifest":
        return Manifest(location(values["path"]))
    if kind == "datasets":
        return HubDataset(**values)
    raise SourceError(f"this store's audio comes from a source of kind '{kind}', which this hearsae does not know")


def load_clip(store: ActivationStore, clip: int, source: Source | None = None) -> np.ndarray:
    """The audio of one clip of a store: float32 [n_samples], mono, 16 kHz. Raises SourceError if it is gone or unreadable."""
    row = {name: store.clips[name][clip].as_py() for name in ("source", "source_row", "start_s", "duration_s")}
    source = source or reopen_source(store.header.dataset)
    return source.read(row["source"], row["source_row"], row["start_s"], round(row["duration_s"] * SAMPLE_RATE))


def _split_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a SourceItem that a row of metadata gives: text, speaker, language, and all else as extra."""
    fields: dict[str, Any] = {"extra": dict(row)}
    for field, names in (("text", TEXT_COLUMNS), ("speaker", SPEAKER_COLUMNS), ("language", LANGUAGE_COLUMNS)):
        name = next((name for name in names if row.get(name) not in (None, "")), None)
        if name is not None:
            fields[field] = str(fields["extra"].pop(name))
    return fields


# An audio folder


class AudioFolder:
    """A folder of audio files in the layout of Hugging Face's `audiofolder`, with or without metadata.

    Splits are the folders below the root. `metadata.jsonl`, `.csv` or `.parquet` in any folder describes the files beside and below it
    by `file_name`. A `source` is a path relative to the root, so a store outlives a move of its dataset.
    """

    in_order_only = False

    def __init__(self, root: Location, split: str | None = None) -> None:
        self.root, self.split = root, split
        if not root.is_dir():
            raise SourceError(f"there is no folder {root}")
        if split is not None and not (_stays_inside(split) and (root / split).is_dir()):
            folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            raise SourceError(f"{root} has no split '{split}'" + (f"; it has: {', '.join(folders)}" if folders else ""))

    def describe(self) -> dict[str, Any]:
        return {"kind": "audiofolder", "root": str(self.root.resolve()), "split": self.split}

    def items(self) -> Iterator[SourceItem | SkippedSource]:
        files, metadata = self._scan()
        if not files and not metadata:
            raise SourceError(f"there are no audio files in {self.root / self.split if self.split else self.root}")

        def item(source: str) -> SourceItem | SkippedSource:
            if not _is_text(source):
                return SkippedSource(repr(source), 0, "its name is not valid UTF-8")
            try:
                if not _stays_inside(source):
                    raise SourceError("its file_name leads out of the dataset's folder")
                if source not in files:
                    raise SourceError("the metadata names it, but there is no such file")
                return SourceItem(source, 0, header_samples(self.root / source), **_split_columns(metadata.get(source, {})))
            except SourceError as error:
                return SkippedSource(source, 0, str(error))

        yield from in_order(item, sorted(files | metadata.keys()), self.root)

    def _scan(self) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """Audio files, and what metadata says of a file, both by path relative to the root."""
        files: set[str] = set()
        metadata: dict[str, dict[str, Any]] = {}
        top = self.root / self.split if self.split else self.root
        for name in names_below(top):
            path = PurePosixPath(self.split or "", name)
            if path.suffix.lower() in READABLE_SUFFIXES + UNREADABLE_SUFFIXES:
                files.add(path.as_posix())
            elif path.name in METADATA:
                for row in _metadata_rows(top / name):
                    metadata[(path.parent / str(row.pop("file_name"))).as_posix()] = row
        return files, metadata

    def read(self, source: str, source_row: int, start_s: float, n_samples: int) -> np.ndarray:
        return decode(self.file(source, source_row), start_s, n_samples)

    def file(self, source: str, source_row: int) -> Location:
        if not _stays_inside(source):
            raise SourceError("its path leads out of the dataset's folder")
        return self.root / source


class MicroSpeech(AudioFolder):
    """The speech that comes with hearsae.

    A store remembers it by name, not by path, so another installation finds it too; and by what is spoken in it, so that one with other
    speech says so instead of playing something else.
    """

    def __init__(self, split: str | None = None, sha256: str | None = None) -> None:
        if not micro.SPEECH.is_dir():
            raise SourceError(f"this installation of hearsae lacks the speech of micro ({micro.SPEECH}): install it again")
        super().__init__(micro.SPEECH, split)
        # Of the times of all words and phones: no two syntheses have the same.
        self.sha256 = hashlib.sha256((micro.SPEECH / "alignments.jsonl").read_bytes()).hexdigest()
        if sha256 not in (None, self.sha256):
            raise SourceError("the speech of micro is another in this version of hearsae: capture it again")

    def describe(self) -> dict[str, Any]:
        return {"kind": "micro", "split": self.split, "sha256": self.sha256}


class AudioFile(AudioFolder):
    """One audio file. What the metadata beside it says of it is known too."""

    def __init__(self, path: Location) -> None:
        super().__init__(path.parent)
        self.name = path.name

    def describe(self) -> dict[str, Any]:
        return {"kind": "audiofile", "path": str(self.root.resolve() / self.name)}

    def _scan(self) -> tuple[set[str], dict[str, dict[str, Any]]]:
        metadata: dict[str, dict[str, Any]] = {}
        for table in METADATA:
            if (self.root / table).is_file():
                metadata |= {row["file_name"]: row for row in _metadata_rows(self.root / table) if row["file_name"] == self.name}
        for row in metadata.values():
            del row["file_name"]
        return {self.name}, metadata


def _metadata_rows(path: Location) -> Iterator[dict[str, Any]]:
    read = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    for where, row in read(path):
        if not row.get("file_name"):
            raise SourceError(f"{where}: there is no file_name")
        yield row


def _parquet_rows(path: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = pq.read_table(arrow_input(path)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path} can't be read: {_first_line(error)}") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _csv_rows(path: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                yield f"{path}:{number}", {name: value for name, value in row.items() if name is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} can't be read: {error}") from error


def _json_lines(path: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) for each line that is not blank."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise SourceError(f"{path}:{number}: not a JSON object")
                    if "\\ud" in line.lower():
                        json.dumps(row, ensure_ascii=False).encode()  # refuses halves of surrogate pairs, which JSON allows and nobody can store
                    yield f"{path}:{number}", row
    except UnicodeEncodeError as error:
        raise SourceError(f"{path}:{number}: not Unicode text (half a surrogate pair)") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{number}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except (RecursionError, ValueError) as error:  # nested without end, numbers of thousands of digits
        raise SourceError(f"{path}:{number}: can't be read ({error})") from error
    except OSError as error:
        raise SourceError(f"{path} can't be read: {error.strerror or error}") from error


def _stays_inside(source: str) -> bool:
    return not source.startswith("/") and ".." not in source.split("/")  # PurePosixPath takes twenty times as long


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# A manifest


class Manifest:
    """A JSONL file, one clip or file a line: `audio` (or `audio_filepath`, `file_name`, `path`), `text`, `offset`, `duration`, anything else.

    Paths are absolute, relative to the manifest, or addresses (s3://bucket/key). With a `duration` no file is opened to plan.
    """

    in_order_only = False
    PATH_COLUMNS = ("audio", "audio_filepath", "file_name", "path")

    def __init__(self, path: Location) -> None:
        self.path = path

    def describe(self) -> dict[str, Any]:
        return {"kind": "manifest", "path": str(self.path.resolve())}

    def items(self) -> Iterator[SourceItem | SkippedSource]:
        def item(line: tuple[int, tuple[str, dict[str, Any]]]) -> SourceItem | SkippedSource:
            number, (where, row) = line
            name = next((name for name in self.PATH_COLUMNS if row.get(name)), None)
            if name is None:
                raise SourceError(f"{where}: no audio path (one of {', '.join(self.PATH_COLUMNS)})")
            source, offset, duration = str(row.pop(name)), row.pop("offset", None) or 0.0, row.pop("duration", row.pop("duration_s", None))
            try:
                file = self.file(source, number)
                start = round(float(offset) * SAMPLE_RATE)
                n_samples = header_samples(file) - start if duration is None else round(float(duration) * SAMPLE_RATE)
                if start < 0 or n_samples < 1:
                    raise SourceError(f"nothing is left of it from offset {offset} on")
                return SourceItem(source, number, n_samples, offset_samples=start, **_split_columns(row))
            except SourceError as error:
                return SkippedSource(source, number, str(error))
            except (TypeError, ValueError, OverflowError) as error:
                raise SourceError(f"{where}: offset and duration must be numbers of seconds") from error

        yield from in_order(item, enumerate(_json_lines(self.path)), self.path)

    def file(self, source: str, source_row: int) -> Location:
        if "://" in source:
            return _address(source)
        if source.startswith("/"):
            return Path(source)
        if not _stays_inside(source):
            raise SourceError("its path leads out of the manifest's folder (give an absolute path if that is meant)")
        return self.path.parent / source

    def read(self, source: str, source_row: int, start_s: float, n_samples: int) -> np.ndarray:
        # Durations in manifests are rounded: up to one frame may lack.
        return decode(self.file(source, source_row), start_s, n_samples, tolerance=SAMPLES_PER_FRAME)


def _address(source: str) -> Location:
    try:
        return location(source)
    except HearsaeError as error:
        raise SourceError(str(error)) from error


# A dataset of the `datasets` library


class HubDataset:
    """A `datasets` dataset with an audio column: of the hub, saved to disk, or Parquet files; map-style or streaming."""

    def __init__(self, path: str, split: str | None, subset: str | None = None, streaming: bool = False) -> None:
        self.path, self.split, self.subset, self.streaming = path, split, subset, streaming
        self.in_order_only = streaming
        self._data = self._load()
        self._column = self._audio_column()
        self._data = self._data.cast_column(self._column, _audio_bytes())
        self._stream: Iterator[dict[str, Any]] | None = None
        self._next_row = 0
        self._last: tuple[int, dict[str, Any]] | None = None

    def describe(self) -> dict[str, Any]:
        path = str(Path(self.path).resolve()) if "://" not in self.path and Path(self.path).exists() else self.path
        return {"kind": "datasets", "path": path, "split": self.split, "subset": self.subset, "streaming": self.streaming}

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        try:
            with quiet():
                if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                    loaded = datasets.load_from_disk(self.path)
                    if self.streaming and isinstance(loaded, datasets.Dataset):
                        loaded = loaded.to_iterable_dataset()
                elif self.path.endswith(".parquet"):
                    loaded = datasets.load_dataset("parquet", data_files=str(kept_copy(location(self.path))), streaming=self.streaming)
                else:
                    with offline_without_network():
                        loaded = datasets.load_dataset(self.path, self.subset, streaming=self.streaming)
        except RemoteError:
            raise
        except Exception as error:  # the library raises many kinds for "there is none" and "no network"
            raise SourceError(f"the dataset '{self.path}' can't be loaded: {_first_line(error)}") from error
        if isinstance(loaded, dict):
            if self.split is None and len(loaded) > 1:
                raise SourceError(f"the dataset '{self.path}' has several splits, choose one with --split: {', '.join(loaded)}")
            if self.split is not None and self.split not in loaded:
                raise SourceError(f"the dataset '{self.path}' has no split '{self.split}'; it has: {', '.join(loaded)}")
            loaded = loaded[self.split or next(iter(loaded))]
        elif self.split not in (None, str(loaded.split)):
            raise SourceError(f"the dataset '{self.path}' has no split '{self.split}': it is a single one, leave --split out")
        return loaded

    def _audio_column(self) -> str:
        import datasets

        features = self._data.features or {}
        for name, feature in features.items():
            if isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()):
                return name
        for name, feature in features.items():
            if getattr(feature, "dtype", None) in ("binary", "large_binary"):  # whole files
                return name
        raise SourceError(f"the dataset '{self.path}' has no audio column; its columns are: {', '.join(features) or 'unknown'}")

    def items(self) -> Iterator[SourceItem | SkippedSource]:
        for number, row in enumerate(self._data):
            audio = row.pop(self._column)
            extra = {key: value for key, value in row.items() if isinstance(value, str | int | float | bool | None)}
            if audio and audio.get("path"):
                extra["file"] = Path(audio["path"]).name
            try:
                yield SourceItem(self.path, number, header_samples(_file_of(audio)), **_split_columns(extra))
            except SourceError as error:
                yield SkippedSource(self.path, number, str(error))

    def read(self, source: str, source_row: int, start_s: float, n_samples: int) -> np.ndarray:
        return decode(_file_of(self._row(source_row)[self._column]), start_s, n_samples)

    def file(self, source: str, source_row: int) -> Location | None:
        found = _file_of(self._row(source_row)[self._column])
        return Path(found) if isinstance(found, str) and Path(found).is_absolute() else None

    def _row(self, number: int) -> dict[str, Any]:
        if self._last is None or self._last[0] != number:
            self._last = (number, self._streamed_row(number) if self.streaming else self._data[number])
        return self._last[1]

    def _streamed_row(self, number: int) -> dict[str, Any]:
        # A stream runs forward only: rows asked for in ascending order cost one pass, going back starts another.
        if self._stream is None or number < self._next_row:
            self._stream, self._next_row = iter(self._data), 0
        for row in self._stream:
            self._next_row += 1
            if self._next_row == number + 1:
                return row
        raise SourceError(f"the stream ended before row {number}")


def _audio_bytes() -> Any:
    import datasets

    return datasets.Audio(decode=False)


def _file_of(audio: Any) -> str | io.BytesIO:
    if audio and audio.get("bytes"):
        return io.BytesIO(audio["bytes"])
    if audio and audio.get("path"):
        return str(audio["path"])
    raise SourceError("the row has no audio")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
