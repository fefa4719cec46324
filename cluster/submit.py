"""Ray Jobs: any command of hearsae on a cluster, with its log, its status and its end.

Needs `hearsae[cluster]` (Ray's job server and its client). What a Ray cluster offers here is remote code execution, so it belongs in a
private network, or behind Ray's token: `docs/cluster.md`.
"""

import asyncio
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cache.errors import HearsaeError
from cluster.workers import import_ray

DASHBOARD_PORT = 8265
OTHER_PORTS = {6379: "Ray's GCS", 10001: "the Ray Client"}
"""Ports of a head node that people take for the dashboard's."""
CONNECT_SECONDS = 10
POLL_SECONDS = 1.0
DELETE_LOOKS = 3
EXCLUDED = ("*.zarr/", "*.egg-info/", "hearsae-demo/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
"""Never shipped, beside what Ray leaves out itself (.git, .venv, __pycache__ and what .gitignore names)."""
NOT_FOR_JOBS = ("submit", "jobs")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ClusterError(HearsaeError):
    """A cluster that can't be reached, refuses, or does not know what it was asked."""


class Job(NamedTuple):
    """What a cluster says of a job."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    name: str
    entrypoint: str
    message: str
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    exit_code: int | None


class JobServer:
    """The job server of a Ray cluster, at the address of its dashboard."""

    def __init__(self, address: str | None = None) -> None:
        """address: http(s)://host[:port], or host[:port]; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or port 8265 of this machine.

        Raises ClusterError if no Ray job server answers there, or it wants a token that this environment does not give.
        """
        self.address = dashboard_address(address)
        import_ray()
        try:
            import aiohttp  # noqa: F401 - Ray's client can't do without
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ClusterError("submitting jobs needs more of Ray than is installed here: pip install 'hearsae[cluster]'") from error
        for module in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        headers = request_headers(os.environ)
        self.session = self._greet(headers)
        with _address_in_environment(self.address), self._explained():
            self._client = JobSubmissionClient(self.address, headers=headers)

    @property
    def is_this_machine(self) -> bool:
        """Whether the cluster's head node runs here (and is not only reached through a tunnel that begins here)."""
        from ray._common.utils import get_default_ray_temp_dir

        folders = {get_default_ray_temp_dir(), os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")}
        return bool(self.session) and any((Path(folder) / self.session).is_dir() for folder in folders)

    def _greet(self, headers: Mapping[str, str]) -> str:
        """The name of the cluster's session."""
        import requests

        parts = urlsplit(self.address)
        hint = f"the address is that of Ray's dashboard, usually http://{parts.hostname}:{DASHBOARD_PORT}"
        if parts.port in OTHER_PORTS:
            raise ClusterError(f"{parts.port} is the port of {OTHER_PORTS[parts.port]}, not of its job server: {hint}")
        try:
            answer = requests.get(f"{self.address}/api/version", headers=headers, timeout=CONNECT_SECONDS)
        except requests.exceptions.ConnectTimeout as error:
            raise ClusterError(f"nothing answers at {self.address} within {CONNECT_SECONDS} s: is it behind a firewall? {hint}") from error
        except requests.exceptions.SSLError as error:
            raise ClusterError(f"{self.address} can't be trusted, or does not speak TLS ({_innermost(error)})") from error
        except requests.exceptions.RequestException as error:
            raise ClusterError(f"there is no Ray job server at {self.address} ({_innermost(error)}): {hint}") from error
        if answer.status_code in (401, 403):
            raise ClusterError(self._about_token(answer.status_code))
        try:
            return str(answer.json()["session_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise ClusterError(f"what answers at {self.address} is no Ray job server (HTTP {answer.status_code}): {hint}") from error

    def _about_token(self, status: int) -> str:
        give = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH; default: ~/.ray/auth_token)"
        if status == 401:
            return f"the cluster at {self.address} wants a token: set {give}, or RAY_JOB_HEADERS"
        return f"the cluster at {self.address} refuses the token that this environment gives: check {give}, or RAY_JOB_HEADERS"

    @contextmanager
    def _explained(self, job: str | None = None) -> Iterator[None]:
        """Makes one line of what Ray's client raises."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(self._about_token(403 if "invalid" in str(error) else 401)) from error
        except requests.exceptions.RequestException as error:
            raise ClusterError(f"the connection to {self.address} broke ({_innermost(error)})") from error
        except (RuntimeError, ValueError, OSError) as error:
            if job is not None and "status code 404" in str(error):
                raise ClusterError(f"there is no job {job} on {self.address}: 'hearsae jobs list' names them") from error
            lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)] or [type(error).__name__]
            raise ClusterError(f"{self.address}: {lines[-1]}") from error  # of a traceback on the other side, what it is about

    def submit(self, entrypoint: str, **settings: Any) -> str:
        """Starts a job, returns its id. settings: as `JobSubmissionClient.submit_job` has them."""
        with self._explained():
            return self._client.submit_job(entrypoint=entrypoint, **settings)

    def jobs(self) -> list[Job]:
        """All that were submitted, the latest last."""
        with self._explained():
            found = self._client.list_jobs()
        return sorted((_job(details) for details in found if details.submission_id), key=lambda job: job.started or 0.0)

    def job(self, job: str) -> Job:
        """Raises ClusterError for one that the cluster does not know, as all that follow."""
        with self._explained(job):
            return _job(self._client.get_job_info(job))

    def log(self, job: str) -> str:
        """Everything that the job wrote so far, of both streams."""
        with self._explained(job):
            return self._client.get_job_logs(job)

    def stop(self, job: str) -> bool:
        """Ends a job; what it committed stays. False if it did not run any more."""
        with self._explained(job):
            return bool(self._client.stop_job(job))

    def delete(self, job: str) -> bool:
        """Forgets a job that has ended. Of one that has just been stopped, Ray may write down once more that it was: that goes too."""
        with self._explained(job):
            deleted = bool(self._client.delete_job(job))
            for _ in range(DELETE_LOOKS):
                time.sleep(POLL_SECONDS)
                if any(found.submission_id == job for found in self._client.list_jobs()):
                    self._client.delete_job(job)
        return deleted

    def wait(self, job: str) -> Job:
        """Until the job has ended."""
        while (found := self.job(job)).status not in ENDED:
            time.sleep(POLL_SECONDS)
        return found

    def follow(self, job: str) -> Iterator[str]:
        """The job's log, in pieces, from its beginning until the job has ended. A broken connection is taken up again."""
        seen = 0
        while True:
            ended = self.job(job).status in ENDED
            if ended:
                rest = self.log(job)[seen:]
                if rest:
                    yield rest
                return
            at = 0
            with suppress(RuntimeError, OSError, asyncio.TimeoutError):  # aiohttp's errors are OSErrors or these; the job is asked for above
                for piece in _in_turn(self._client.tail_job_logs(job)):
                    at += len(piece)
                    if at > seen:
                        yield piece[len(piece) - (at - seen) :]
                        seen = at
            time.sleep(POLL_SECONDS)


def dashboard_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """`given`, else what the environment names, else this machine's, as http(s)://host:port. Raises ClusterError for what can't be one."""
    address = given or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS") or "auto"
    where = "--address" if given else "RAY_ADDRESS"
    if address in ("auto", "local"):
        address = "127.0.0.1"
    parts = urlsplit(address if "://" in address else f"http://{address}")
    hint = f"give the address of Ray's dashboard, http://{parts.hostname or 'HOST'}:{DASHBOARD_PORT}"
    if parts.scheme == "ray":
        raise ClusterError(f"{where} {address} is for the Ray Client: {hint}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
        raise ClusterError(f"{where} {address} is no address of a job server: {hint}")
    if "://" not in address and port is None:
        return f"http://{parts.netloc}:{DASHBOARD_PORT}"
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def request_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """Of every request: those of RAY_JOB_HEADERS (a JSON object), and Ray's token, where one is set up. Raises ClusterError if that is not so."""
    headers: dict[str, str] = {}
    if text := environment.get("RAY_JOB_HEADERS"):
        try:
            headers = {str(name): str(value) for name, value in json.loads(text).items()}
        except (ValueError, AttributeError) as error:
            raise ClusterError('RAY_JOB_HEADERS is no JSON object of headers, {"NAME": "VALUE"}') from error
    wants_token = environment.get("RAY_AUTH_MODE", "").lower() == "token"
    has_token = environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")
    if any(name.lower() == "authorization" for name in headers) or not (wants_token or has_token):
        return headers
    token = environment.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise ClusterError(f"RAY_AUTH_MODE is token, but there is no RAY_AUTH_TOKEN, and {path} can't be read ({error.strerror})") from error
    return headers | {"Authorization": f"Bearer {token}"}


def entrypoint(command: Sequence[str], python: str) -> str:
    """The shell command of a job that runs `hearsae COMMAND...`: by the module, so that shipped code goes before installed code."""
    return shlex.join([python, "-m", "cluster.cli", *command])


def for_a_job(arguments: Sequence[str]) -> list[str]:
    """A hearsae command line as a job runs it: on the cluster that the job is part of, not on an embedded Ray of its own.

    Parses it as the command itself would, so wrong usage ends here, with status 2. Raises HearsaeError for what can't be a job.
    """
    from cluster.cli import COMMANDS, no_such, parse, split_name

    if not arguments or arguments[0] not in COMMANDS:
        there_is = f"there is no command '{arguments[0]}'" if arguments else "no command was given"
        known = ", ".join(name for name in COMMANDS if name not in NOT_FOR_JOBS)
        print(f"hearsae submit: {there_is}: after -- stands one of {known}, with its options", file=sys.stderr)
        raise SystemExit(2)
    name, options = split_name(arguments)
    if name in NOT_FOR_JOBS:
        raise HearsaeError(f"'{name}' is for the machine that you sit at, not for a job")
    if unknown := no_such(name):
        print(f"hearsae submit: {unknown}", file=sys.stderr)
        raise SystemExit(2)
    command = parse(name, options)
    out = getattr(command, "folder", getattr(command, "out", None))
    if isinstance(out, Path) and not out.is_absolute():
        raise HearsaeError(
            f"--out {out} is a relative path, and a job starts in a folder of its own that is deleted after it: "
            "give an absolute path that every machine of the cluster shares, or an address in an object store"
        )
    connects = hasattr(command, "address") and command.address is None and not getattr(command, "no_ray", False)
    return [*arguments, *(["--address", "auto"] if connects else [])]


def environment_of(pairs: Sequence[str]) -> dict[str, str]:
    """`("A=1", "B=2")` -> `{"A": "1", "B": "2"}`. Raises HearsaeError for what has no name."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.replace("_", "a").isalnum() or name[0].isdigit():
            raise HearsaeError(f"--env {pair!r} is not NAME=VALUE")
        values[name] = value
    return values


def shipped(working_dir: Path, exclude: Sequence[str]) -> dict[str, Any]:
    """The part of a job's runtime environment that sends a folder along. Raises HearsaeError if there is none."""
    if not (isinstance(working_dir, Path) and working_dir.is_dir()):
        raise HearsaeError(f"--working-dir {working_dir} is not a folder")
    return {"working_dir": str(working_dir.resolve()), "excludes": [*EXCLUDED, *exclude]}


def job_id(given: str | None) -> str | None:
    """`given`, where it can be the id of a job; raises HearsaeError where not: it becomes part of addresses and of file names."""
    if given is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", given):
        raise HearsaeError(f"{given!r} can't be the id of a job: letters, digits, '_', '-' and '.' only")
    return given


def _job(details: Any) -> Job:
    # Of a command that failed Ray says so, and then repeats its log: the last line of that is hearsae's own word.
    what, _, log = (details.message or "").partition(", last available logs")
    said = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines()[1:] if line.strip()]
    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        name=(details.metadata or {}).get("job_name", ""),
        entrypoint=details.entrypoint,
        message=" ".join([*what.split(), *(["-", *said[-1].split()] if said else [])]),
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        exit_code=details.driver_exit_code,
    )


def _in_turn(pieces: AsyncIterator[str]) -> Iterator[str]:
    """An asynchronous iterator as a plain one."""
    with asyncio.Runner() as runner:  # at its end it cancels what still waits, and closes `pieces`
        while True:
            try:
                yield runner.run(_next(pieces))
            except StopAsyncIteration:
                return


async def _next(pieces: AsyncIterator[str]) -> str:
    return await anext(pieces)


@contextmanager
def _address_in_environment(address: str) -> Iterator[None]:
    """Ray's client lets RAY_ADDRESS override the address that it is given; for us it is the other way round."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _innermost(error: BaseException) -> str:
    """The plainest reason within nested errors: `Connection refused`."""
    reason: BaseException = error
    while (inner := getattr(reason, "reason", None) or reason.__cause__ or reason.__context__) and isinstance(inner, BaseException):
        reason = inner
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
