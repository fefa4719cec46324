"""Who may import whom, and what a command may load before it works."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import fill_store, plan_of

ROOT = Path(__file__).parents[1]
LAYERS = ["cache", "sae", "analysis", "cluster"]
"""Each may import itself and those before it."""
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it, by statement or by `import_module("...")`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__"):
            name = node.args[0]
            text = name.values[0] if isinstance(name, ast.JoinedStr) else name
            if isinstance(text, ast.Constant):
                yield str(text.value).partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_depend_one_way(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    above = set(LAYERS[layer + 1 :]) | {"tests", "benchmarks", "conftest"} | ({"ray"} if LAYERS[layer] != "cluster" else set())
    assert not above & set(imported(path))


def test_every_package_is_looked_at():
    found = {path.relative_to(ROOT).parts[0] for path in MODULES}
    assert found == set(LAYERS) == {path.parent.name for path in ROOT.glob("*/__init__.py")}


def loaded_by(code: str) -> set[str]:
    """The heavy packages in memory after `code` in a fresh Python."""
    heavy = ("torch", "ray", "whisper", "datasets", "numba")
    ending = f"\nimport sys; print('LOADED', *[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_command_line_answers_without_loading_what_works(arguments):
    assert loaded_by(f"import cluster.cli; cluster.cli.main({arguments!r})") == set()


def test_info_loads_neither_torch_nor_ray(tmp_path):
    fill_store(tmp_path / "acts.zarr", plan_of([1.0], chunk_rows=64), {"encoder.blocks.0": 4}, lambda site, clip, n: 1.0)
    assert loaded_by(f"import cluster.cli; assert cluster.cli.main(['info', {str(tmp_path / 'acts.zarr')!r}]) == 0") == set()


def test_importing_everything_below_cluster_does_not_load_ray():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.relative_to(ROOT).parts[0] != "cluster"]
    assert "ray" not in loaded_by("\n".join(f"import {name}" for name in modules if not name.endswith("__main__")))


def test_the_console_script_is_the_command_line():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "hearsae"]
    assert script.value == "cluster.cli:main"
