"""The TensorBoard log of a training run, beside its results. Beside results in an object store it is uploaded now and then."""

import tempfile
import time
from pathlib import Path
from typing import Any

from cache.errors import HearsaeError
from cache.location import Location, RemotePath, put

UPLOAD_EVERY_S = 60.0
"""Between two uploads; before a checkpoint is another, so that a run that goes on from it has a log without holes."""


def open_log(out: Location, position: int) -> Any:
    """A SummaryWriter for the folder `tb` of a run's, to be used as a context manager; what an earlier run logged beyond `position` is taken back.

    Raises HearsaeError where it can't be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # a second of imports, for training only

    folder = out / "tb"
    try:
        if isinstance(folder, RemotePath):
            return _UploadedLog(folder, position)
        return SummaryWriter(str(folder), purge_step=_next(position))
    except OSError as error:
        raise HearsaeError(f"can't write {out}: {error.strerror or error}") from error


def _next(position: int) -> int | None:
    """The first step that counts no longer where an earlier attempt logged it."""
    return position + 1 if position else None


class _UploadedLog:
    """Writes in a temporary folder; TensorBoard's files only ever grow, and are small enough to be sent whole again."""

    def __init__(self, folder: RemotePath, position: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._local = tempfile.TemporaryDirectory(prefix="hearsae-log-")
        self._writer = SummaryWriter(self._local.name, purge_step=_next(position))
        self._next_upload = time.monotonic() + UPLOAD_EVERY_S

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)
        if time.monotonic() > self._next_upload:
            self._upload()

    def flush(self) -> None:
        """Uploads it: what is logged before a checkpoint should outlive the process as the checkpoint does."""
        self._upload()

    def _upload(self) -> None:
        self._writer.flush()
        for file in Path(self._local.name).iterdir():
            put(self._folder / file.name, file.read_bytes())
        self._next_upload = time.monotonic() + UPLOAD_EVERY_S

    def __enter__(self) -> "_UploadedLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._upload()
        finally:
            self._writer.close()
            self._local.cleanup()
