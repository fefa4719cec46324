"""`hearsae submit`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cache.errors import HearsaeError
from cluster.commands import Output
from cluster.submit import JobServer, entrypoint, environment_of, for_a_job, job_id, shipped

NOT_FOUND = 127
"""Of a shell whose command does not exist."""


@dataclass(frozen=True, kw_only=True)
class Submit(Output):
    """Run a command of hearsae as a job on a Ray cluster: hearsae submit --address http://HEAD:8265 -- cache --dataset ...

    The job goes on when this machine is switched off: 'hearsae jobs' tells of it. Paths in the command are those of the cluster.
    """

    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What stands after `--`."""
    address: str | None = None
    """Dashboard of the cluster, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine."""
    working_dir: Path | None = None
    """Send this folder along and start there, a clone of hearsae, say: its code then goes before an installed one. Default: installed there."""
    exclude: tuple[str, ...] = ()
    """What of the folder to leave out, in .gitignore's spelling; beside .git, .venv, stores and what .gitignore names."""
    python: str | None = None
    """Interpreter on the cluster that has hearsae; default: python, or this one where the cluster runs on this machine."""
    env: tuple[str, ...] = ()
    """NAME=VALUE: environment variables of the job and of its workers. Who may see the cluster's dashboard can read them."""
    num_cpus: float | None = None
    """Cores to set aside for the command itself, beside those of its workers."""
    num_gpus: float | None = None
    """GPUs to set aside for the command itself (one that works in its own process, as evaluate does)."""
    memory: int | None = None
    """Bytes to set aside for the command itself."""
    name: str | None = None
    """Name of the job, for people."""
    submission_id: str | None = None
    """Id of the job; default: Ray chooses one."""
    wait: bool = False
    """Wait until it ends, and exit as it does."""
    follow: bool = False
    """Show its log meanwhile (with --json on stderr); includes --wait. Ctrl-C leaves the job running."""

    def run(self) -> Iterator[dict[str, Any]]:
        command = for_a_job(self.command)
        environment = {"env_vars": environment_of(self.env)} if self.env else {}
        if self.working_dir is not None:
            environment |= shipped(self.working_dir, self.exclude)
        server = JobServer(self.address)
        line = entrypoint(command, self.python or (sys.executable if server.is_this_machine else "python"))
        job = server.submit(
            line,
            runtime_env=environment,
            submission_id=job_id(self.submission_id),
            metadata={"job_name": self.name} if self.name else None,
            entrypoint_num_cpus=self.num_cpus,
            entrypoint_num_gpus=self.num_gpus,
            entrypoint_memory=self.memory,
        )
        said = {"id": job, "address": server.address, "entrypoint": line}
        if not (self.wait or self.follow):
            yield said | {"status": server.job(job).status, "exit_code": None}
            return
        print(f"hearsae: job {job} on {server.address}", file=sys.stderr)
        try:
            for piece in server.follow(job) if self.follow else ():
                if self.json:
                    print(piece, end="", file=sys.stderr)
                else:
                    yield {"log": piece}
            end = server.wait(job)
        except KeyboardInterrupt:
            raise HearsaeError(f"the job goes on: 'hearsae jobs logs {job} --follow' shows it, 'hearsae jobs stop {job}' ends it") from None
        yield said | {"status": end.status, "exit_code": end.exit_code, "message": end.message}

    def summary(self, result: dict[str, Any]) -> str:
        if "log" in result:
            return result["log"].removesuffix("\n")
        if result["status"] in ("PENDING", "RUNNING"):
            return f"{result['id']}: submitted to {result['address']}\n'hearsae jobs logs {result['id']} --follow' shows what it does"
        return f"{result['id']}: {result['status'].lower()}"

    def complaint(self, result: dict[str, Any]) -> str | None:
        if result["status"] == "STOPPED":
            return f"the job {result['id']} was stopped"
        if result["status"] != "FAILED":
            return None
        is_missing = "No module named" in result["message"] or result["exit_code"] == NOT_FOUND
        hint = "; is hearsae installed there? --python names another interpreter, --working-dir sends the code along" if is_missing else ""
        return f"the job {result['id']} failed: {result['message']}{hint}"

    def exit_status(self, result: dict[str, Any]) -> int:
        """That of the job; 1 where it has none of its own."""
        return (result["exit_code"] or 1) if result["status"] in ("FAILED", "STOPPED") else 0
