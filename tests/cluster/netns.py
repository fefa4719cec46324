"""Runs tests' commands and functions where there is no network but loopback, and where nothing outlives them.

Ray announces a machine's outer address even when told loopback. In a network namespace of its own it finds 127.0.0.1 and nothing else. The
same call makes a process namespace, whose end kills all that was started in it (Ray's daemons leave their process group), and a mount
namespace, in which a test may mount a small disk that nobody else sees. As root, or as a user who may make user namespaces.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
LOOPBACK_UP = ("sh", "-c", 'PATH="$PATH:/usr/sbin:/sbin" ip link set lo up && "$@"; exit $?', "sh")
"""The shell stays: as process 1 it buries the dead, and its end is that of the namespace."""
NOTICE_DEATH_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""Ray's settings for tests that kill nodes: its own notice after a quarter of a minute."""


@cache
def prefix() -> tuple[str, ...]:
    """What to put before a command. Skips the test where namespaces are not permitted; fails it if HEARSAE_NEEDS_NAMESPACES is set."""
    reasons = []
    for unshare in (UNSHARE, (*UNSHARE, "--map-root-user")):
        try:
            tried = subprocess.run([*unshare, *LOOPBACK_UP, "true"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(str(error))
            continue
        if tried.returncode == 0:
            return (*unshare, *LOOPBACK_UP)
        reasons.append(tried.stderr.strip())
    refuse = pytest.fail if os.environ.get("HEARSAE_NEEDS_NAMESPACES") else pytest.skip
    refuse(f"needs namespaces (unshare, ip; root or user namespaces): {'; '.join(dict.fromkeys(reasons))}")


@contextmanager
def environment(more: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """For a process in the namespace: our modules and the tests', one thread, a folder of its own for Ray's sessions."""
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: the path of a socket has at most 107 characters
    try:
        yield os.environ | {
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "RAY_TMPDIR": ray_folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **(more or {}),
        }
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def run(command: Sequence[str | Path], timeout: float, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command alone in its namespace, with what it wrote. Fails the test after `timeout` seconds; everything it started is gone then."""
    with environment(env) as full:
        try:
            return subprocess.run([*prefix(), *map(str, command)], env=full, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            said = b"\n".join(part for part in (expired.stdout, expired.stderr) if isinstance(part, bytes)).decode(errors="replace")
            pytest.fail(f"not done within {timeout:g} s: {' '.join(map(str, command))[:200]}\n{said[-6000:]}")


def call(function: Callable[..., Any], *arguments: Any, timeout: float, env: Mapping[str, str] | None = None) -> Any:
    """`function(*arguments)`, alone in its namespace. The function is one of a module's own; arguments (paths as text) and result pass as JSON.

    Fails the test, with what was written there, if the function raises or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = json.dumps([function.__module__, function.__name__, arguments, str(result)], default=str)
        done = run([sys.executable, "-c", "import netns; netns.answer()", request], timeout, env)
        if done.returncode or not result.is_file():
            pytest.fail(f"{function.__name__} ended with status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-12000:]}")
        sys.stderr.write(done.stderr)  # pytest shows it where the test fails later
        return json.loads(result.read_text())


def answer() -> None:
    """The other side of `call`."""
    module, name, arguments, result = json.loads(sys.argv[1])
    try:
        value = getattr(import_module(module), name)(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # whatever still runs here ends with the namespace
    Path(result).write_text(json.dumps(value))


@contextmanager
def cluster(nodes: int, cpus: int = 1, head_cpus: int | None = None, **head: Any) -> Iterator[Any]:
    """A Ray cluster of so many nodes in this namespace, the head counted: a `ray.cluster_utils.Cluster`, whose `address` commands take.

    head: further settings of the head node, `include_dashboard=True` for jobs, say.
    """
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20}
    settings = {"num_cpus": cpus if head_cpus is None else head_cpus, "include_dashboard": False, "_system_config": NOTICE_DEATH_SOON}
    made = Cluster(initialize_head=True, head_node_args={**small, **settings, **head})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=cpus, **small)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()  # a driver here, if there is one, else nothing
        made.shutdown()
