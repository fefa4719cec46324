"""Where distributed work runs: on a Ray cluster, on an embedded Ray that starts and stops by itself, or in this process."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cache.errors import HearsaeError

CONNECT_SECONDS = 10
OBJECT_STORE_BYTES = 512 << 20
"""Of an embedded Ray: only small results travel through it."""


@dataclass(frozen=True)
class WorkerOptions:
    """Where the work runs."""

    address: str | None = None
    """Ray cluster to use; default: an embedded local Ray that starts and stops by itself."""
    no_ray: bool = False
    """Work in this process, without Ray."""
    workers: int | None = None
    """Worker processes; default: one per core (or per GPU)."""
    gpus_per_worker: float | None = None
    """GPUs that each worker gets; default: one for a worker that can use it, where there are any."""

    def check(self) -> None:
        """Raises HearsaeError for settings that can't be."""
        if self.workers is not None and self.workers < 1:
            raise HearsaeError(f"--workers {self.workers} must be at least 1")


@contextmanager
def session(options: WorkerOptions) -> Iterator[None]:
    """Keeps one Ray for several pieces of work; starts it if it does not run yet, and then stops it at the end.

    Raises HearsaeError for options that can't be, a cluster that can't be reached, and where no Ray can be started.
    """
    options.check()
    if options.no_ray:
        yield
        return
    ray = import_ray()
    starts_here = not ray.is_initialized()
    try:
        if starts_here:
            _start(ray, options)
        yield
    finally:
        if starts_here:
            ray.shutdown()


def import_ray() -> Any:
    """Ray, with what it says of itself turned down."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a coming default at every start
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else what it prints of dead workers comes from the main thread, which is ours
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its C++ part writes errors that it recovers from to our stderr
    import ray

    return ray


def _start(ray: Any, options: WorkerOptions) -> None:
    _refuse_silence(options.address)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if options.address is None:
        cores = max((options.workers or 0) * getattr(options, "cpus_per_worker", 1), len(os.sched_getaffinity(0)))
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1"}
    try:
        with _nothing_on_descriptor_2():
            ray.init(address=options.address or "local", **settings)
    except Exception as error:  # of many kinds, and a bare one where a node takes too long to start
        where = f"the Ray cluster at {options.address} can't be reached" if options.address else "an embedded Ray can't be started here"
        raise HearsaeError(f"{where} ({str(error).splitlines()[0]}); --no-ray works in this process") from error


def _refuse_silence(address: str | None) -> None:
    """Raises HearsaeError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or "")
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise HearsaeError(f"nobody answers at {address} ({error}): give the address that 'ray start' printed on the head, HOST:6379") from error


@contextmanager
def _nothing_on_descriptor_2() -> Iterator[None]:
    """Ray's C++ part announces there, before it has read its settings, that it reads them."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
