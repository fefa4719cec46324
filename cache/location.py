"""Where things are: in a local file system, or in an object store as `s3://bucket/key` or `gs://bucket/key`.

`RemotePath` has the parts of pathlib's interface that hearsae uses, so code that keeps to them works for either.
"""

import ctypes
import hashlib
import io
import os
import re
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeAlias, TypeVar

from cache.bucket import Bucket, open_bucket
from cache.errors import HearsaeError, StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMES = ("s3", "gs")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
READ_AHEAD = 256 << 10
"""Bytes fetched at once from an object that is read piece by piece: a request takes as long as this many bytes do."""
SYNC_FILE_RANGE_WRITE = 2
"""Linux's fs.h"""
REQUESTS_AT_ONCE = 32
"""Small ones: each waits some ten milliseconds for its answer."""


class Stat(NamedTuple):
    """What is known of an object without reading it."""

    st_size: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """An address in an object store. There are no folders: `is_dir` is a prefix that holds anything.

    What asks the store raises FileNotFoundError where there is nothing, and RemoteError for all else that fails.
    """

    scheme: str
    bucket: str
    key: str
    """Without a slash at either end; empty for the bucket itself."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    def __truediv__(self, name: str | os.PathLike[str]) -> "RemotePath":
        """One or more levels down. Raises HearsaeError for a name that would lead out: data may hold any."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise HearsaeError(f"'{name}' leads out of {self}")
        return RemotePath(self.scheme, self.bucket, "/".join([*filter(None, [self.key]), *path.parts]))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    @property
    def store(self) -> Bucket:
        """The bucket, opened as this process's environment says."""
        return open_bucket(self.scheme, self.bucket)

    def read_bytes(self) -> bytes:
        return self.store.get(self.key)

    def stat(self) -> Stat:
        return Stat(self.store.size(self.key))

    def is_file(self) -> bool:
        try:
            return bool(self.key) and self.stat().st_size >= 0
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        return self.store.holds_any(self.key)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> "Iterator[RemotePath]":
        return (self / name for name in self.store.children(self.key))

    def unlink(self, missing_ok: bool = False) -> None:
        """Whether there was anything is not looked at."""
        self.store.delete(self.key)

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """For reading: as text, fetched whole, or as bytes ("rb"), fetched where they are read."""
        if mode == "rb":
            return io.BufferedReader(RemoteFile(self))
        if mode == "r":
            return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding, newline=newline)
        raise ValueError(f"mode {mode}: write with cache.location.put")


Location: TypeAlias = Path | RemotePath


def location(spec: str | Path | RemotePath) -> Location:
    """A path, or an address that begins with s3:// or gs://. Raises HearsaeError for an address that can't be one."""
    if not isinstance(spec, str):
        return spec
    address = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", spec, re.DOTALL)
    if not address:
        return Path(spec)
    scheme, bucket, key = address.groups()
    if scheme not in SCHEMES:
        raise HearsaeError(f"'{spec}' can't be read or written: addresses begin with s3:// or gs://")
    if not BUCKET.fullmatch(bucket):
        raise HearsaeError(f"'{spec}' names no bucket: write {scheme}://BUCKET/NAME")
    return RemotePath(scheme, bucket, "") / key.lstrip("/")


class RemoteFile(io.RawIOBase):
    """An object as a file for reading that can be sought in. Its first bytes stay in memory; of the rest, what was read last.

    `error` keeps what went wrong, for a caller whose library reads from C and can't let exceptions through.
    """

    def __init__(self, path: RemotePath, first: int = READ_AHEAD, raises: bool = True) -> None:
        """first: bytes fetched at once, with the size. raises: False ends the file where reading fails, and leaves the rest to `error`.

        Raises FileNotFoundError if there is no such object.
        """
        self.path = path
        self._raises = raises
        self.error: BaseException | None = None
        self._start, self._size = path.store.get_start(path.key, first)
        self._block, self._block_start = b"", 0
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        try:
            data = self._fetch(self._position, wanted)
        except Exception as error:
            self.error = error
            if self._raises:
                raise
            return 0
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, start: int, length: int) -> bytes:
        """At least one byte from `start`, at most `length`."""
        if start < len(self._start):
            return self._start[start : start + length]
        if not self._block_start <= start < self._block_start + len(self._block):
            stop = min(start + max(length, READ_AHEAD), self._size)
            self._block, self._block_start = self.path.store.get_range(self.path.key, start, stop), start
        return self._block[start - self._block_start :][:length]


def put(path: Location, data: bytes | memoryview) -> None:
    """Writes a file or an object whole or not at all. Raises StoreError on a full disk or a read-only place, RemoteError where a store refuses.

    A file atomically and durably: aside, fsync, rename. An object by its nature: it appears when all of it has arrived.
    """
    if isinstance(path, RemotePath):
        path.store.put(path.key, data)
        return
    with FileAside(path) as file:
        file.write(data)
        file.into_place()


class FileAside:
    """A file that is written aside and appears whole and durably, or not at all. Give it to `with`; begins at the first `write`.

    Its methods raise StoreError on a full disk or a read-only place.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._file: IO[bytes] | None = None

    def write(self, *parts: Any, start: bool = False) -> None:
        """Bytes, one part after the other. start: have the system write them to the disk now, not half a minute later, without waiting for it."""
        with self._errors():
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._aside, "wb")  # noqa: SIM115 - closed in __exit__
            self._file.writelines(parts)
            if start:
                self._file.flush()
                with suppress(AttributeError):  # of Linux
                    ctypes.CDLL(None).sync_file_range(self._file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)

    def into_place(self) -> None:
        """Synchronises and renames it."""
        assert self._file is not None
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._aside, self._path)

    def __enter__(self) -> "FileAside":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Removes what is not in its place."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, said before
                self._file.close()
            self._aside.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"can't write {self._path}: {error.strerror or error}") from error


def reach(path: Location) -> None:
    """Raises RemoteError if `path` is in an object store that can't be used. To be asked before there is work to lose."""
    if isinstance(path, RemotePath):
        path.is_dir()


def names_below(folder: Location) -> Iterator[str]:
    """Every file below a folder, as its path relative to it, with slashes."""
    if isinstance(folder, RemotePath):
        start = len(folder.key) + 1 if folder.key else 0
        yield from (key[start:] for key in folder.store.keys(folder.key))
        return
    for parent, _, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        yield from ((relative / name).as_posix() for name in names)


def names_in(folder: Location) -> list[str]:
    """The names of what is right in a folder; none where there is no folder."""
    if isinstance(folder, RemotePath):
        return folder.store.children(folder.key)
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def in_order(function: Callable[[Item], Result], items: Iterable[Item], place: Location, at_once: int = REQUESTS_AT_ONCE) -> Iterator[Result]:
    """`map(function, items)` for what waits for `place`: where that is an object store, `at_once` items at once, and only so many ahead."""
    if not isinstance(place, RemotePath):
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(at_once, "requests")
    try:
        coming: deque[Future[Result]] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) == 2 * at_once:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def arrow_input(path: Location) -> Any:
    """What pyarrow can read."""
    return path.open("rb") if isinstance(path, RemotePath) else path


def kept_copy(path: Location) -> Path:
    """A file for libraries that read nothing else and come back to it: itself, or a copy kept below ~/.cache/hearsae until the object changes."""
    if not isinstance(path, RemotePath):
        return path
    name = hashlib.sha256(f"{path} {path.store.version(path.key)}".encode()).hexdigest()
    copy = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hearsae" / f"{name}{path.suffix}"
    if not copy.is_file():
        put(copy, path.read_bytes())
    return copy


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A file for libraries that read nothing else: itself, or a copy for as long as it is needed."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="hearsae-", suffix=path.suffix) as file:
        file.write(path.read_bytes())
        file.flush()
        yield Path(file.name)
