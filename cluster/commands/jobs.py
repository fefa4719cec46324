"""`hearsae jobs`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import tyro

from cache.errors import HearsaeError
from cluster.commands import Output
from cluster.submit import JobServer, job_id


@dataclass(frozen=True, kw_only=True)
class Jobs(Output):
    """The jobs of a Ray cluster: list them, or see the status or the logs of one, stop it, or (once it has ended) delete it."""

    action: Annotated[Literal["list", "status", "logs", "stop", "delete"], tyro.conf.Positional] = "list"
    """What to do."""
    id: Annotated[str | None, tyro.conf.Positional] = None
    """The job."""
    address: str | None = None
    """Dashboard of the cluster, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine."""
    follow: bool = False
    """With logs: go on until the job ends (with --json on stderr). Ctrl-C leaves the job running."""

    def run(self) -> Iterator[dict[str, Any]]:
        if self.action != "list" and self.id is None:
            raise HearsaeError(f"which job? 'hearsae jobs {self.action} ID'; 'hearsae jobs list' names them")
        server = JobServer(self.address)
        job = job_id(self.id) or ""
        match self.action:
            case "list":
                yield {"address": server.address, "jobs": [job._asdict() for job in server.jobs()]}
            case "status":
                yield server.job(job)._asdict()
            case "logs":
                yield from self._logs(server, job)
            case "stop":
                yield {"id": job, "stopped": server.stop(job)}
            case "delete":
                yield {"id": job, "deleted": server.delete(job)}

    def _logs(self, server: JobServer, job: str) -> Iterator[dict[str, Any]]:
        if not self.follow:
            yield {"id": job, "logs": server.log(job)}
            return
        try:
            for piece in server.follow(job):
                if self.json:
                    print(piece, end="", file=sys.stderr)
                else:
                    yield {"logs": piece}
        except KeyboardInterrupt:
            print(f"hearsae: the job {job} goes on", file=sys.stderr)
            return
        if self.json:
            yield {"id": job, "logs": server.log(job), "status": server.job(job).status}

    def summary(self, result: dict[str, Any]) -> str:
        match self.action:
            case "logs":
                return result["logs"].removesuffix("\n")
            case "list":
                return "\n".join(map(_line, result["jobs"])) or f"there are no jobs on {result['address']}"
            case "status":
                return _line(result) + (f"\n{result['message']}" if result["message"] else "")
            case "stop":
                return f"{self.id}: " + ("stopping; what it committed stays" if result["stopped"] else "it had ended already")
        return f"{self.id}: deleted"


def _line(job: dict[str, Any]) -> str:
    started = datetime.fromtimestamp(job["started"]).isoformat(" ", "seconds") if job["started"] else "not started"
    name = f"  {job['name']}" if job["name"] else ""
    command = job["entrypoint"].partition(" -m cluster.cli ")[2] or job["entrypoint"]
    return f"{job['id']}  {job['status']:9}  {started}{name}  {command if len(command) <= 100 else command[:97] + '...'}"
