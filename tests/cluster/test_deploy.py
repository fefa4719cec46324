"""The files of docs/deploy and the command lines of docs/cluster.md, as far as they can be held to anything without a cluster.

Not tested: that Kubernetes, AWS or SLURM do with them what they should. The SLURM script runs for real, on stand-ins for `srun` and `scontrol`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
import yaml

from cluster.cli import COMMANDS, parse
from cluster.submit import for_a_job

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
TEXTS = [ROOT / "docs" / "cluster.md", *sorted(DEPLOY.iterdir())]
TOOLS = Path(sys.executable).parent
RAY = "2.60.0"


# Command lines


def command_lines(text: str) -> Iterator[list[str]]:
    """Every command of hearsae that a text shows at the beginning of a line; without those that leave parts of it to the reader (...)."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.match(r"(?:# +)?(?:\$ )?(?:[A-Z_]+=\S* )*(?:hearsae|sbatch .*?slurm\.sh) +(\w.*)", line.strip())
        if found and "..." not in line:
            yield shlex.split(found[1])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_line_is_one_that_hearsae_takes(path):
    for words in command_lines(path.read_text()):
        assert words[0] in COMMANDS, words
        command = parse(words[0], words[1:])
        if words[0] == "submit":
            assert for_a_job(command.command)


def test_the_page_shows_commands():
    shown = [words[0] for words in command_lines((ROOT / "docs" / "cluster.md").read_text())]
    assert len(shown) > 10 and {"submit", "jobs", "cache", "scan", "info"} <= set(shown)


def test_links_of_the_page_lead_somewhere():
    text = (ROOT / "docs" / "cluster.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert {f"deploy/{path.name}" for path in DEPLOY.iterdir()} <= set(links)
    assert all((ROOT / "docs" / link).exists() for link in links)


# Kubernetes

OF_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
OF_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
OF_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
OF_CONTAINER = {"name", "image", "ports", "resources", "volumeMounts"}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def cluster_spec(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(("name", "kind", "fields"), [("raycluster.yaml", "RayCluster", OF_CLUSTER), ("rayjob.yaml", "RayJob", OF_JOB)])
def test_manifests_keep_to_the_fields_of_kuberay(name, kind, fields):
    found = manifest(name)
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind) and found["metadata"]["name"]
    assert set(found["spec"]) <= fields
    spec = cluster_spec(found)
    assert set(spec) <= OF_CLUSTER and spec["rayVersion"] == RAY and spec["authOptions"] == {"mode": "token"}
    assert set(spec["headGroupSpec"]) <= {"rayStartParams", "template"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) <= OF_CONTAINER and container["image"] == "REGISTRY/hearsae:TAG"
            assert container["resources"]["requests"] == container["resources"]["limits"]  # Ray counts on all of it
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in spec["workerGroupSpecs"]:
        assert set(group) == OF_GROUP and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_what_hearsae_takes():
    words = shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "cluster.cli"]
    command = parse(words[3], words[4:])
    assert command.address == "auto" and command.out.is_absolute() and command.sites == ("encoder.blocks.2", "encoder.blocks.2.mlp.1")


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_manifests_keep_to_the_schemas_of_kuberay_where_they_are_at_hand(name):
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("needs KubeRay's custom resource definitions (set KUBERAY_CRDS to ray-operator/config/crd/bases of a clone)")
    import jsonschema

    found = manifest(name)
    definition = yaml.safe_load((Path(folder) / f"ray.io_{found['kind'].lower()}s.yaml").read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(found)


def closed(schema: Any) -> None:
    """Makes unknown fields wrong, as `kubectl apply --validate=strict` does, and numbers-or-strings what they say."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        closed(part)


# The cloud


def test_ray_up_takes_its_config():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "cpu", "gpu"} and prepared["head_node_type"] == "head"
    assert any("--dashboard-host=127.0.0.1" in line for line in prepared["head_start_ray_commands"])
    with pytest.raises(Exception, match="bogus"):
        validate_config(prepare_config(config | {"bogus": 1}))


# The image


def test_the_image_is_built_from_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    assert f"ray[default]=={RAY}" in text and re.search(r"^USER 1000$", text, re.MULTILINE)
    done = subprocess.run([TOOLS / "hadolint", "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "", done.stdout


# SLURM


def test_the_slurm_script_is_clean():
    for command in (["bash", "-n"], [TOOLS / "shellcheck"]):
        done = subprocess.run([*command, DEPLOY / "slurm.sh"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


STAND_INS = {
    "scontrol": 'printf "one\\ntwo\\n"',
    "hostname": "echo 127.0.0.1",
    "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == -* ]]; do shift; done; exec "$@"',
}


@pytest.mark.cluster
@pytest.mark.slow
def test_the_slurm_script_starts_a_cluster_of_its_nodes_and_runs_the_command(tmp_path):
    """Both of its nodes are this machine."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "LOG": str(tmp_path / "log")}
    environment = slurm | {"HEARSAE_PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEARSAE_START_SECONDS": "120"}
    command = ["cache", "--dataset", "micro", "--model", "micro", "--sites", "encoder.blocks.0", "--limit", "8", "--device", "cpu"]
    done = netns.run([DEPLOY / "slurm.sh", *command, "--out", tmp_path / "acts.zarr", "--json"], timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "slurm.sh: 2 of 2 nodes, 2 cores" in done.stderr
    (summary,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert summary["clips"] == 8 and summary["shards_computed"] == summary["shards"]
    assert [line.split()[1:3] for line in (tmp_path / "log").read_text().splitlines()] == [["--nodes=1", "--ntasks=1"]] * 3
    failed = subprocess.run([DEPLOY / "slurm.sh"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2 and "usage: sbatch" in failed.stderr
