"""The wheel: what it carries, and that it runs the demo on its own, from an empty folder and without a network."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("cache", "sae", "analysis", "cluster"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return next(out.glob("hearsae-*.whl"))


def test_it_carries_micro_and_the_page_and_no_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    speech = ROOT / "cache" / "micro" / "speech"
    expected = {"cache/micro/micro.pt", *(path.relative_to(ROOT).as_posix() for path in speech.rglob("*.*"))}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "analysis" / "explorer").iterdir() if path.suffix in (".html", ".js", ".css")}
    assert expected <= names
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"cache", "sae", "analysis", "cluster"}
    assert not [name for name in names if "recipe" in name or "test" in Path(name).name]
    assert wheel.stat().st_size < 12e6


@pytest.mark.slow
def test_the_demo_of_an_installed_wheel_needs_no_network(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)], check=True, timeout=120)
    alone = ["unshare", "--map-root-user", "--net"] if _can_unshare() else []
    program = "import cache, sys; assert cache.__file__.startswith(sys.argv.pop(1)), cache.__file__; from cluster.cli import main; sys.exit(main())"
    command = [*alone, sys.executable, "-c", program, str(installed), "demo", "--no-ray", "--rows", "100000", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(empty)}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["page"]).is_relative_to(empty)
    assert Path(json.loads(done.stdout)["page"]).is_file()


def _can_unshare() -> bool:
    return subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0 if shutil.which("unshare") else False
