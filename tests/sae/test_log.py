"""The log of a run: TensorBoard, and Weights & Biases beside it, in one run however often the process stops."""

import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cache.errors import HearsaeError
from cache.location import location
from sae.log import open_log

STAND_IN = '''
"""In place of the real package, which is not installed with the tests: keeps what it is told."""
import json
from pathlib import Path

__version__ = "0.20.1"

class Error(Exception):
    pass

class Run:
    def __init__(self, settings):
        self.file = Path(settings["dir"] or WITHOUT_DIR) / "told.jsonl"
        self.tell("init", settings)

    def tell(self, what, value):
        with open(self.file, "a") as file:
            file.write(json.dumps([what, value]) + "\\n")

    def define_metric(self, name, **settings):
        self.tell("define_metric", name)

    def log(self, values):
        self.tell("log", values)

    def finish(self, exit_code):
        self.tell("finish", exit_code)

def init(**settings):
    if settings["project"] == "closed":
        raise Error("no such\\nproject")
    return Run(settings)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> Any:
    """The stand-in, as if installed."""
    module = types.ModuleType("wandb")
    exec(STAND_IN, vars(module))
    vars(module)["WITHOUT_DIR"] = tmp_path
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def told(folder: Path, what: str) -> list[Any]:
    return [value for kind, value in map(json.loads, (folder / "told.jsonl").read_text().splitlines()) if kind == what]


def losses(folder: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, pytest.approx(event.value)) for event in board.Scalars("loss")]


def write(log, steps: range) -> None:
    for step in steps:
        log.add_scalar("loss", 1 / step, step)
        log.add_scalar("fvu", 2 / step, step)


def test_without_weights_and_biases_there_is_tensorboard_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with open_log(tmp_path / "run", 0) as log:
        write(log, range(100, 400, 100))
    assert losses(tmp_path / "run") == [(100, 1 / 100), (200, 1 / 200), (300, 1 / 300)]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tb"]


def test_both_get_everything(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    with open_log(tmp_path / "run", 0, "speech", "narrow", {"k": 3}) as log:
        write(log, range(100, 300, 100))
    assert told(tmp_path / "run", "log") == [{"rows": 100, "loss": 0.01, "fvu": 0.02}, {"rows": 200, "loss": 0.005, "fvu": 0.01}]
    assert told(tmp_path / "run", "finish") == [0]
    (settings,) = told(tmp_path / "run", "init")
    assert settings | {"project": "speech", "name": "narrow", "config": {"k": 3}, "reinit": "create_new", "resume": "allow"} == settings
    assert losses(tmp_path / "run") == [(100, 1 / 100), (200, 1 / 200)]


def test_a_run_that_stopped_goes_on_as_the_same_run(tmp_path, wandb):
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt), open_log(out, 0, "speech") as log:
        write(log, range(100, 400, 100))
        raise KeyboardInterrupt
    with open_log(out, 200, "speech") as log:
        write(log, range(300, 500, 100))
    first, second = told(out, "init")
    assert first["id"] == second["id"]
    assert [values["rows"] for values in told(out, "log")] == [100, 200, 300, 300, 400]
    assert told(out, "finish") == [1, 0]
    assert [step for step, _ in losses(out)] == [100, 200, 300, 400]
    (tmp_path / "other").mkdir()
    with open_log(tmp_path / "other", 0, "speech"):
        pass
    assert told(tmp_path / "other", "init")[0]["id"] != first["id"]


def test_what_is_flushed_is_there_before_the_end(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    with open_log(tmp_path / "run", 0, "speech") as log:
        write(log, range(100, 200, 100))
        assert told(tmp_path / "run", "log") == []
        log.flush()
        assert [values["rows"] for values in told(tmp_path / "run", "log")] == [100]
        assert losses(tmp_path / "run") == [(100, 1 / 100)]


def test_a_run_in_an_object_store_keeps_its_id_there(tmp_path, wandb, s3):
    out = location(f"s3://{s3.bucket}/run")
    for position in (0, 100):
        with open_log(out, position, "speech") as log:
            write(log, range(position + 100, position + 200, 100))
    first, second = told(tmp_path, "init")  # it has no folder there to write to
    assert first["id"] == second["id"] == json.loads((out / "wandb.json").read_bytes())["id"]
    assert first["dir"] is None


def test_what_can_not_work_is_said_in_one_line(tmp_path, wandb, monkeypatch):
    with pytest.raises(HearsaeError, match=r"Weights & Biases refused \(no such project\): log in"):
        open_log(tmp_path / "run", 0, "closed")
    with pytest.raises(HearsaeError, match="is logged to the project closed of Weights & Biases, not to speech"):
        open_log(tmp_path / "run", 0, "speech")
    (tmp_path / "run" / "wandb.json").write_text('{"project": "speech", "id": "../../x"}')
    with pytest.raises(HearsaeError, match=r"wandb.json is damaged \(its id is none\)"):
        open_log(tmp_path / "run", 0, "speech")
    monkeypatch.setattr(wandb, "__version__", "0.19.9")
    with pytest.raises(HearsaeError, match=r"wandb 0.19.9 is too old .* 'wandb>=0.19.10'"):
        open_log(tmp_path / "other", 0, "speech")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(HearsaeError, match=r"pip install 'hearsae\[wandb\]'"):
        open_log(tmp_path / "other", 0, "speech")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_package_takes_two_runs_at_once_and_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for position in (0, 200):
        with open_log(tmp_path / "a", position, "speech") as a, open_log(tmp_path / "b", position, "speech") as b:
            for log in (a, b):
                write(log, range(position + 100, position + 300, 100))
        time.sleep(1.1)  # wandb names its folders by the second
    for name in ("a", "b"):
        run_id = json.loads((tmp_path / name / "wandb.json").read_text())["id"]
        assert len(list((tmp_path / name / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))) == 2
        assert [step for step, _ in losses(tmp_path / name)] == [100, 200, 300, 400]
