"""The recipes of docs/cookbook.md, run in their order in an empty folder: they work, and print what the page shows.

Numbers may differ by a little: another machine's products round differently. What a trained SAE says may differ altogether, so of that only the
columns and the number of lines are compared. Recipes that need a command which is not there (`<!-- needs NAME -->`) are left out.
"""

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.cli import COMMANDS, main

PAGE = Path(__file__).parents[1] / "docs" / "cookbook.md"
ON_WORKERS = ("cache", "train", "scan", "align")
"""Commands that would start Ray: here they work in this process."""
TRAINED = ("latents", "sae")
"""What a command names whose numbers training decides."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.03
LEAST_RECIPES = 12


class Block(NamedTuple):
    """One block of code."""

    recipe: str
    language: str
    code: str
    needs: str | None
    printed: str | None
    """What a `text` block right after it shows."""


def blocks() -> list[Block]:
    found: list[Block] = []
    recipe, needs = "", None
    for match in re.finditer(
        r"^## (?P<title>[^\n]*)$|^<!-- needs (?P<needs>\w+) -->$|^```(?P<language>\w+)\n(?P<code>.*?)^```$", PAGE.read_text(), re.M | re.S
    ):
        if match["title"]:
            recipe = match["title"]
        elif match["needs"]:
            needs = match["needs"]
        elif match["language"] == "text":
            found[-1] = found[-1]._replace(printed=match["code"])
        else:
            found.append(Block(recipe, match["language"], match["code"], needs, None))
            needs = None
    return found


def commands(code: str) -> Iterator[tuple[list[str], list[str]]]:
    """The arguments of each command of a block, and the lines shown below it."""
    for part in re.split(r"^\$ ", code, flags=re.M)[1:]:
        command, *shown = part.rstrip("\n").split("\n")
        program, *arguments = shlex.split(command)
        assert program == "hearsae", command
        yield arguments, shown


def assert_like(shown: list[str], printed: list[str]) -> None:
    """The same words, and nearly the same numbers; the last line is how long it took."""
    if shown and shown[-1] == "...":
        shown, printed = shown[:-1], printed[: len(shown) - 1]
    assert len(shown) == len(printed), (shown, printed)
    for expected, line in zip(shown, printed, strict=True):
        if re.fullmatch(r"[\d.]+ s", expected):
            assert re.fullmatch(r"[\d.]+ s", line)
            continue
        assert NUMBER.sub("#", expected).split() == NUMBER.sub("#", line).split()
        for a, b in zip(NUMBER.findall(expected), NUMBER.findall(line), strict=True):
            assert float(b) == pytest.approx(float(a), rel=TOLERANCE, abs=1e-3), (expected, line)


def run(arguments: list[str], shown: list[str], capfd: Any) -> None:
    capfd.readouterr()
    extra = ["--no-ray"] if arguments[0] in ON_WORKERS else []
    assert main([*arguments, *extra]) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out.rstrip("\n").split("\n")
    if any(name in arguments for name in TRAINED) and shown:
        assert len(shown) == len(printed) and shown[0].split() == printed[0].split()
    elif shown:
        assert_like(shown, printed)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder, and the names that the recipes in Python share."""
    return tmp_path_factory.mktemp("kitchen"), {}


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.recipe} ({block.language})")
def test_the_recipes_print_what_the_page_shows(kitchen, monkeypatch, capfd, block):
    folder, names = kitchen
    monkeypatch.chdir(folder)
    if block.needs is not None and block.needs not in COMMANDS:
        pytest.skip(f"needs hearsae {block.needs}")
    if block.language == "sh":
        for arguments, shown in commands(block.code):
            run(arguments, shown, capfd)
        return
    assert block.language == "python" and block.printed is not None
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(block.code, str(PAGE), "exec"), names)
    assert_like(block.printed.rstrip("\n").split("\n"), out.getvalue().rstrip("\n").split("\n"))


def test_the_page_has_its_recipes_and_every_python_block_shows_what_it_prints():
    found = blocks()
    assert len({block.recipe for block in found}) >= LEAST_RECIPES
    assert all(block.printed is not None for block in found if block.language == "python")
    asked = {flag for block in found if block.language == "sh" for flag in re.findall(r"--[a-z-]+", block.code)}
    assert asked >= {"--feature", "--time", "--frame", "--from", "--like", "--rows", "--save", "--sql", "--csv", "--phone", "--word", "--text"}
