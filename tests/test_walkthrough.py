"""docs/walkthrough.ipynb: what it shows came from running it, and it still runs.

To make it again: `cd docs && ../.venv/bin/jupyter-execute --inplace walkthrough.ipynb`, and remove the folder `walkthrough` that it leaves.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"
MOST_BYTES = 2 << 20
"""It is cloned with the project."""


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, 4)


def shown(notebook: nbformat.NotebookNode) -> list[list[set[str]]]:
    """The kinds of output of every cell of code: text, pictures, tables, players."""
    return [
        [{"stream"} if output.output_type == "stream" else set(output.data) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream")


def test_the_notebook_was_run_from_top_to_bottom_and_shows_what_it_speaks_of():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    kinds = [kind for cell in shown(notebook) for kind in cell]
    assert sum("image/png" in kind for kind in kinds) >= 2 and sum("text/html" in kind for kind in kinds) >= 6
    assert sum("<audio" in output.data.get("text/html", "") for cell in code for output in cell.outputs if "data" in output) >= 5
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_the_notebook_tells_nothing_of_the_machine_that_it_was_run_on():
    assert not re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users)/", NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_notebook_runs_in_an_empty_folder_to_the_same_kinds_of_output(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = read()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(notebook) == shown(read())
    commands = r"^\$ hearsae .*$"
    assert re.findall(commands, printed(notebook), re.M) == re.findall(commands, printed(read()), re.M)
    assert (tmp_path / "walkthrough" / "page" / "index.html").is_file()
