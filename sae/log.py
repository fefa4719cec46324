"""The log of a training run: TensorBoard, always, beside its results; Weights & Biases too, where that is asked for.

Beside results in an object store TensorBoard's files are uploaded now and then.
"""

import json
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from cache.errors import HearsaeError
from cache.location import Location, RemotePath, put

UPLOAD_EVERY_S = 60.0
"""Between two uploads; before a checkpoint is another, so that a run that goes on from it has a log without holes."""
WANDB_RUN = "wandb.json"
"""In a run's folder: its id at Weights & Biases."""
WANDB_FEWEST = (0, 19, 10)
"""The first wandb that can have several runs open in one process, as a grid needs."""


class Log(Protocol):
    """What the training loop writes to; a context manager."""

    def add_scalar(self, name: str, value: float, step: int) -> Any:
        """step: rows consumed."""

    def flush(self) -> Any:
        """What was added should outlive this process."""

    def __enter__(self) -> "Log": ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> Any: ...


def open_log(out: Location, position: int, wandb_project: str | None = None, name: str | None = None, config: Mapping[str, Any] | None = None) -> Log:
    """The log of the run in `out`, that goes on after `position` rows: of TensorBoard, in the folder `tb`, what was logged beyond is taken back.

    wandb_project: log to this project of Weights & Biases as well; the same run goes on after a stop, and what is logged once more stands
    there twice. name, config: of that run. Reads WANDB_MODE and all else that wandb reads from the environment.
    Raises HearsaeError where it can't be written, and where wandb is not installed, too old, or refuses.
    """
    if wandb_project is None:
        return _tensorboard(out, position)
    wandb = import_wandb()
    with ExitStack() as opened:
        board = opened.enter_context(_tensorboard(out, position))
        run = opened.enter_context(_WandbLog(wandb, out, wandb_project, name, config))
        return _Logs((board, run), opened.pop_all())


def _tensorboard(out: Location, position: int) -> Log:
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


class _WandbLog:
    """A run at Weights & Biases. It has `rows` as its x axis: wandb's own steps can't go back, as a run does that goes on from a checkpoint."""

    def __init__(self, wandb: Any, out: Location, project: str, name: str | None, config: Mapping[str, Any] | None) -> None:
        self._pending: dict[str, float] = {}
        """Of the last step: wandb wants all values of a step at once."""
        try:
            self._run = wandb.init(
                project=project,
                id=_wandb_id(out, project),
                resume="allow",
                reinit="create_new",  # the runs of a grid are open side by side
                name=name,
                config=dict(config or {}),
                dir=None if isinstance(out, RemotePath) else str(out),
            )
            self._run.define_metric("rows", hidden=True)
            self._run.define_metric("*", step_metric="rows")
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise HearsaeError(f"Weights & Biases refused ({reason}): log in with 'wandb login', set WANDB_MODE=offline, or leave it out") from error

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self._pending.get("rows", step) != step:
            self.flush()
        self._pending |= {"rows": step, name: value}

    def flush(self) -> None:
        if self._pending:
            self._run.log(self._pending)
        self._pending = {}

    def __enter__(self) -> "_WandbLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.flush()
        self._run.finish(exit_code=0 if kind is None else 1)


class _Logs:
    """Several that are written to at once."""

    def __init__(self, logs: tuple[Log, ...], opened: ExitStack) -> None:
        self._logs, self._opened = logs, opened

    def add_scalar(self, name: str, value: float, step: int) -> None:
        for log in self._logs:
            log.add_scalar(name, value, step)

    def flush(self) -> None:
        for log in self._logs:
            log.flush()

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


def import_wandb() -> Any:
    """The module `wandb`. Raises HearsaeError if it is not installed or too old: to be asked before there is work to lose."""
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise HearsaeError("logging to Weights & Biases needs its package: pip install 'hearsae[wandb]', or leave it out") from None
    version = tuple(int(part) for part in re.findall(r"\d+", wandb.__version__)[:3])
    if version < WANDB_FEWEST:
        wanted = ".".join(map(str, WANDB_FEWEST))
        raise HearsaeError(f"wandb {wandb.__version__} is too old to have several runs open: pip install 'wandb>={wanted}'")
    return wandb


def _wandb_id(out: Location, project: str) -> str:
    """The id under which the run in `out` is known; made, and written down, at its first start."""
    path = out / WANDB_RUN
    if not path.exists():
        put(path, json.dumps({"project": project, "id": uuid.uuid4().hex[:12]}).encode())
    try:
        known = json.loads(path.read_bytes())
        found, run_id = known["project"], known["id"]
        if not (isinstance(run_id, str) and re.fullmatch(r"\w{1,64}", run_id)):
            raise ValueError("its id is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HearsaeError(f"{path} is damaged ({error}): remove it to log as a new run") from error
    if found != project:
        raise HearsaeError(f"{out} is logged to the project {found} of Weights & Biases, not to {project}: remove {path} to log as a new run there")
    return run_id
