"""Commands as jobs on a real Ray cluster, on loopback in a namespace of its own; and what is refused before anything is sent."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import netns
import pytest

from cache.errors import HearsaeError
from cluster.cli import main
from cluster.submit import ClusterError, dashboard_address, entrypoint, environment_of, for_a_job, request_headers

ROOT = Path(__file__).parents[2]
SITE = "encoder.blocks.0"
TOKEN = "a-token-that-is-long-enough-to-be-one"


# What stands for itself


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("https://ray.example.org/team/", "https://ray.example.org/team"),
        ("10.0.0.1", "http://10.0.0.1:8265"),
        ("10.0.0.1:9000", "http://10.0.0.1:9000"),
        ("auto", "http://127.0.0.1:8265"),
        (None, "http://127.0.0.1:8265"),
    ],
)
def test_an_address_is_that_of_the_dashboard(given, address):
    assert dashboard_address(given, {}) == address


def test_what_is_given_goes_before_the_environment():
    environment = {"RAY_ADDRESS": "http://one:1", "RAY_API_SERVER_ADDRESS": "http://two:2"}
    assert dashboard_address("http://three:3", environment) == "http://three:3"
    assert dashboard_address(None, environment) == "http://two:2"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://one:1"}) == "http://one:1"


@pytest.mark.parametrize("address", ["ray://head:10001", "ftp://head", "http://", "http://head:port", "http://head:8265/?x=1"])
def test_an_address_that_is_none_is_refused_with_what_it_should_be(address):
    with pytest.raises(ClusterError, match=r"give the address of Ray's dashboard, http://(head|HOST):8265"):
        dashboard_address(address, {})


def test_headers_and_tokens_come_from_the_environment(tmp_path):
    assert request_headers({}) == {}
    assert request_headers({"RAY_JOB_HEADERS": '{"X-A": "1"}'}) == {"X-A": "1"}
    assert request_headers({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}) == {"Authorization": "Bearer t"}
    (tmp_path / "token").write_text("from-a-file\n")
    assert request_headers({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}) == {"Authorization": "Bearer from-a-file"}
    assert request_headers({"RAY_JOB_HEADERS": '{"authorization": "Basic x"}', "RAY_AUTH_TOKEN": "t"}) == {"authorization": "Basic x"}
    for wrong in ("[]", "{", "1"):
        with pytest.raises(ClusterError, match="RAY_JOB_HEADERS is no JSON object"):
            request_headers({"RAY_JOB_HEADERS": wrong})
    with pytest.raises(ClusterError, match=r"missing can't be read \(No such file"):
        request_headers({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")})


def test_a_job_works_on_the_cluster_that_it_is_part_of():
    cache = ["cache", "--dataset", "micro", "--model", "micro", "--sites", SITE, "--out", "/shared/acts.zarr"]
    assert for_a_job(cache) == [*cache, "--address", "auto"]
    assert for_a_job([*cache, "--no-ray"]) == [*cache, "--no-ray"]
    assert for_a_job([*cache, "--address", "10.0.0.1:6379"]) == [*cache, "--address", "10.0.0.1:6379"]
    assert for_a_job(["info", "/shared/acts.zarr"]) == ["info", "/shared/acts.zarr"]
    window = ["experiment", "window", "--k", "10", "--out", "/shared/window"]
    assert for_a_job(window) == [*window, "--address", "auto"]


def test_no_argument_is_read_by_a_shell():
    line = entrypoint(["cache", "--sites", "encoder.blocks.*", "--dataset", "a b;$(touch c)`d`'e'"], "/opt/py thon")
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert read == ["/opt/py thon", "-m", "cluster.cli", "cache", "--sites", "encoder.blocks.*", "--dataset", "a b;$(touch c)`d`'e'"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["submit", "--", "info", "/x"], "is for the machine that you sit at"),
        (["cache", "--dataset", "micro", "--model", "micro", "--sites", SITE, "--out", "acts.zarr"], "--out acts.zarr is a relative path"),
        (["demo"], "is a relative path"),
        (["experiment", "window"], "--out hearsae-window is a relative path"),
    ],
)
def test_what_can_be_no_job_is_refused(command, reason):
    with pytest.raises(HearsaeError, match=reason):
        for_a_job(command)


@pytest.mark.parametrize("command", [[], ["bogus"], ["info"], ["cache", "--bogus"], ["cache", "--dtype", "int8"]])
def test_wrong_usage_after_the_dashes_ends_here(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "--address", "http://127.0.0.1:1", "--", *command])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and "Traceback" not in err
    assert "hearsae submit: " in err or f"hearsae {command[0]} --help" in err


def test_variables_have_names():
    assert environment_of(["A=1", "B_2=x=y", "C="]) == {"A": "1", "B_2": "x=y", "C": ""}
    for wrong in ("A", "=1", "1A=1", "A B=1"):
        with pytest.raises(HearsaeError, match="is not NAME=VALUE"):
            environment_of([wrong])


@pytest.fixture
def server() -> Iterator[str]:
    """Something on HTTP that is no Ray: a path asked for is its own status."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.split("/")[1]) if self.path.split("/")[1].isdigit() else 200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is no Ray job server (HTTP 200)"),
        ("/404", "is no Ray job server (HTTP 404)"),
        ("/401", "wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ("/403", "refuses the token"),
    ],
)
def test_what_is_no_job_server_is_named(server, path, reason, capsys):
    assert main(["jobs", "list", "--address", server + path]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hearsae: ") and err.count("\n") == 1 and reason in err


def test_what_does_not_answer_is_named(capsys):
    for address, reason in (("127.0.0.1:1", "Connection refused"), ("127.0.0.1:6379", "Ray's GCS"), ("127.0.0.1:10001", "the Ray Client")):
        assert main(["submit", "--address", address, "--", "info", "/x"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and reason in err and "usually http://127.0.0.1:8265" in err
    assert main(["jobs", "status", "x;y", "--address", "127.0.0.1:1"]) == 1
    assert main(["jobs", "status", "--address", "127.0.0.1:1"]) == 1
    assert main(["submit", "--address", "127.0.0.1:1", "--working-dir", "/nonexistent", "--", "info", "/x"]) == 1
    assert "--working-dir /nonexistent is not a folder" in capsys.readouterr().err


# A cluster


def hearsae(*arguments: Any, **environment: str) -> dict[str, Any]:
    """Runs a command line; what it wrote, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environment), redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def start_head(**environment: str) -> None:
    """A head node with a job server on 127.0.0.1:8265, as `ray start` starts it."""
    where = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    small = ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *where, *small]
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=os.environ | environment)


def capture_of(out: str, *more: Any) -> list[str]:
    return ["cache", "--dataset", "micro", "--model", "micro", "--sites", SITE, "--out", out, "--device", "cpu", *map(str, more)]


def wait_for(job: str, *statuses: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        found = json.loads(hearsae("jobs", "status", job, "--json")["out"])
        if found["status"] in statuses or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def jobs_on_a_cluster(root: str, clone: str) -> dict[str, Any]:
    """Runs in the namespace: one cluster, everything that one does with jobs."""
    start_head(RAY_AUTH_MODE="disabled")
    said: dict[str, Any] = {"none": hearsae("jobs")}
    said["followed"] = hearsae("submit", "--follow", "--", *capture_of(f"{root}/a.zarr", "--limit", 12, "--json"))
    to_ship = ["--working-dir", clone, "--name", "shipped", "--submission-id", "of-a-clone", "--env", "HEARSAE_A=b c"]
    shipped = capture_of(f"{root}/shipped.zarr", "--limit", 12)
    said["shipped"] = hearsae(
        "submit", "--wait", "--json", *to_ship, "--", *shipped, RAY_ADDRESS="127.0.0.1:6379", RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265"
    )
    said["failed"] = hearsae("submit", "--wait", "--", "info", "/nowhere")
    said["elsewhere"] = hearsae("submit", "--wait", "--python", "/no/such/python", "--", "info", "/nowhere")
    said["left"] = interrupted(
        ["submit", "--follow", "--submission-id", "long", "--", *capture_of(f"{root}/long.zarr", "--sites", "encoder.blocks.*")]
    )
    said["running"] = wait_for("long", "RUNNING")
    said["delete_running"] = hearsae("jobs", "delete", "long")
    said["again"] = hearsae("submit", "--submission-id", "long", "--", "info", "/nowhere")
    said["stop"] = hearsae("jobs", "stop", "long")
    said["stopped"] = wait_for("long", "STOPPED")
    said["waited_for_stopped"] = hearsae("jobs", "logs", "long", "--follow")
    said["list"] = hearsae("jobs", "list", "--json")
    said["listed"] = hearsae("jobs", "list")
    said["logs"] = hearsae("jobs", "logs", "of-a-clone", "--json")
    said["delete"] = hearsae("jobs", "delete", "long")
    said["unknown"] = [hearsae("jobs", action, "long") for action in ("status", "logs", "stop", "delete")]
    return said


def interrupted(arguments: list[str]) -> dict[str, Any]:
    """What a command that follows a job says to Ctrl-C, once the job's log has begun."""
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    return {"status": process.returncode, "out": first + rest, "err": err}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, Any]:
    root, clone = tmp_path_factory.mktemp("jobs"), tmp_path_factory.mktemp("clone")
    for package in ("cache", "sae", "analysis", "cluster"):
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__", "train"))
    writer = clone / "cache" / "shard_writer.py"
    assert "host=socket.gethostname()" in writer.read_text()
    writer.write_text(writer.read_text().replace("host=socket.gethostname()", 'host=__import__("os").environ["HEARSAE_A"] + __file__'))
    (clone / "big.zarr").mkdir()
    (clone / "big.zarr" / "object").write_bytes(b"x")
    return netns.call(jobs_on_a_cluster, root, clone, timeout=300) | {"root": str(root), "clone": str(clone)}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_followed_job_shows_its_log_and_ends_as_it_does(said):
    assert "there are no jobs" in said["none"]["out"]
    followed = said["followed"]
    assert followed["status"] == 0, followed
    lines = followed["out"].splitlines()
    (summary,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert summary["clips"] == 12 and summary["shards_computed"] == summary["shards"]
    assert lines[-1].endswith(": succeeded") and f"{sys.executable} -m cluster.cli cache" in followed["out"]
    assert json.loads((Path(said["root"]) / "a.zarr" / "zarr.json").read_text())["attributes"]["hearsae"]["plan"]["clips"] == 12


@pytest.mark.cluster
@pytest.mark.slow
def test_the_code_that_was_sent_along_is_the_code_that_runs(said):
    shipped = said["shipped"]
    assert shipped["status"] == 0, shipped
    assert json.loads(shipped["out"])["status"] == "SUCCEEDED"
    records = sorted((Path(said["root"]) / "shipped.zarr" / "commits" / SITE).glob("*.json"))
    hosts = {json.loads(record.read_text())["host"] for record in records}
    assert records and all(host.startswith("b c") and host.endswith("/cache/shard_writer.py") for host in hosts), hosts
    assert all("/working_dir_files/" in host and said["clone"] not in host and not Path(host[3:]).with_name("big.zarr").exists() for host in hosts)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_that_fails_fails_its_waiter_with_its_own_words(said):
    failed, elsewhere = said["failed"], said["elsewhere"]
    assert failed["status"] == 1 and "hearsae: there is no activation store at /nowhere" in failed["err"].splitlines()[-1]
    assert elsewhere["status"] == 127 and "--python names another interpreter" in elsewhere["err"].splitlines()[-1]
    for done in (failed, elsewhere):
        assert "Traceback" not in done["err"]


@pytest.mark.cluster
@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_so(said):
    left = said["left"]
    assert left["status"] == 1 and "Traceback" not in left["err"]
    assert "the job goes on: 'hearsae jobs logs long --follow' shows it" in left["err"].splitlines()[-1]
    assert said["running"]["status"] == "RUNNING"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_can_be_stopped_and_forgotten(said):
    for refused, reason in ((said["delete_running"], "long"), (said["again"], "already exists")):
        assert refused["status"] == 1 and refused["out"] == "" and reason in refused["err"] and refused["err"].count("\n") == 1, refused
    assert said["stop"]["status"] == 0 and "stopping" in said["stop"]["out"]
    assert said["stopped"]["status"] == "STOPPED"
    assert said["waited_for_stopped"]["status"] == 0 and "Running entrypoint for job long" in said["waited_for_stopped"]["out"]
    assert said["delete"]["status"] == 0
    for unknown in said["unknown"]:
        assert unknown["status"] == 1 and "there is no job long on http://127.0.0.1:8265" in unknown["err"] and unknown["err"].count("\n") == 1


@pytest.mark.cluster
@pytest.mark.slow
def test_jobs_are_listed_with_what_they_run(said):
    jobs = json.loads(said["list"]["out"])["jobs"]
    assert [job["status"] for job in jobs] == ["SUCCEEDED", "SUCCEEDED", "FAILED", "FAILED", "STOPPED"]
    assert jobs[1]["id"] == "of-a-clone" and jobs[1]["name"] == "shipped" and jobs[1]["exit_code"] == 0
    assert all(job["started"] <= job["ended"] for job in jobs)
    assert len(said["listed"]["out"].splitlines()) == 5 and "cache --dataset micro" in said["listed"]["out"]
    assert "shards computed" in json.loads(said["logs"]["out"])["logs"]


def jobs_behind_a_token(root: str) -> dict[str, Any]:
    """Runs in the namespace: a cluster that wants a token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    start_head(**token)
    command = ["submit", "--wait", "--json", "--", *capture_of(f"{root}/a.zarr", "--limit", 4)]
    return {
        "without": [hearsae("jobs", "list", RAY_AUTH_MODE="disabled"), hearsae(*command, RAY_AUTH_MODE="disabled")],
        "wrong": hearsae("jobs", "list", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another-token-that-is-long-enough"),
        "right": hearsae(*command, **token),
        "by_header": hearsae("jobs", "list", "--json", RAY_AUTH_MODE="disabled", RAY_JOB_HEADERS=json.dumps({"Authorization": f"Bearer {TOKEN}"})),
    }


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cluster_that_wants_a_token_gets_it_from_the_environment_only(tmp_path):
    said = netns.call(jobs_behind_a_token, tmp_path, timeout=150)
    for refused, reason in [*((done, "wants a token: set RAY_AUTH_MODE=token") for done in said["without"]), (said["wrong"], "refuses the token")]:
        assert (refused["status"], refused["out"]) == (1, "") and reason in refused["err"] and refused["err"].count("\n") == 1, refused
    assert said["right"]["status"] == 0, said["right"]
    assert json.loads(said["right"]["out"])["status"] == "SUCCEEDED"
    assert TOKEN not in json.dumps(said["right"])
    assert len(json.loads(said["by_header"]["out"])["jobs"]) == 1
