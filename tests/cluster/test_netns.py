"""The harness itself: loopback and nothing else, nothing left behind, failures that say why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import netns
import pytest

pytestmark = pytest.mark.cluster


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def three_nodes() -> dict[str, list]:
    import ray

    with netns.cluster(3) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        where = ray.remote(lambda: (time.sleep(0.5), ray.get_runtime_context().get_node_id())[1]).options(scheduling_strategy="SPREAD")
        ran_on = set(ray.get([where.remote() for _ in range(6)]))
        nodes = [(node["NodeManagerAddress"], node["Alive"]) for node in ray.nodes()]
        victim = next(node for node in cluster.worker_nodes if node.node_id in ran_on)
        start = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        while sum(node["Alive"] for node in ray.nodes()) == 3:
            time.sleep(0.1)
            assert time.monotonic() - start < 60
        print("noticed after", time.monotonic() - start, "s", file=sys.stderr)
    return {"nodes": nodes, "ran_on": sorted(ran_on)}


def leave_a_daemon_behind(marker: str) -> None:
    subprocess.Popen([sys.executable, "-c", "import sys, time; time.sleep(600)", marker], start_new_session=True)


def mount_a_disk(folder: str) -> int:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    (Path(folder) / "file").write_bytes(b"on the small disk")
    return os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize


def fail() -> None:
    raise ValueError("this is why")


def test_there_is_loopback_and_nothing_else():
    assert netns.call(interfaces, timeout=60) == ["lo"]


@pytest.mark.slow
def test_three_nodes_of_ray_on_loopback_of_which_one_dies():
    seen = netns.call(three_nodes, timeout=120)
    assert seen["nodes"] == [["127.0.0.1", True]] * 3
    assert len(seen["ran_on"]) == 3


def test_what_was_started_ends_with_it():
    marker = f"left-behind-{os.getpid()}-{time.time_ns()}"
    netns.call(leave_a_daemon_behind, marker, timeout=60)
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(entry)]


def test_a_disk_mounted_in_it_is_seen_by_nobody_else(tmp_path):
    assert netns.call(mount_a_disk, tmp_path, timeout=60) == 64 << 10
    assert list(tmp_path.iterdir()) == []


def test_failure_and_lateness_fail_the_test():
    with pytest.raises(pytest.fail.Exception, match="ValueError: this is why"):
        netns.call(fail, timeout=60)
    with pytest.raises(pytest.fail.Exception, match="not done within 1 s"):
        netns.run(["sh", "-c", "echo said; sleep 100"], timeout=1)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
