"""Several processes train what one does: the same selection, the same gradients, the same curve, whatever becomes of a process."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_rows import D_IN, OTHER, PER_ROW, SITE, planted_store
from rank_processes import rank_pool, start_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sparse import KINDS, pre_of

import sae.trainee
from cache.errors import HearsaeError
from cache.store import ActivationStore
from sae.models import ARCHS, WITH_K, SaeConfig
from sae.ranks import Ranks
from sae.selection import BatchTopK, select, select_batch_topk_of_ranks, select_batch_topk_of_ranks_plain
from sae.train import train
from sae.train_config import TrainConfig
from sae.trainee import Trainee

SMALL = {"d_sae": (64,), "k": (PER_ROW,), "batch": 256, "threads": 1, "plots": False, "quiet": True, "lr": 4e-3, "rows": 256 * 60, "log_every": 256}
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
"""Sums in another order differ in float32's last digit, and what 60 steps make of that."""


@pytest.fixture(scope="module")
def on_ranks():
    with rank_pool(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> ActivationStore:
    """6,000 rows. Read only."""
    return planted_store(tmp_path_factory.mktemp("planted") / "acts.zarr", 120.0)


def config_for(store: ActivationStore, out: Path, **settings) -> TrainConfig:
    return TrainConfig(**{"store": (store.path,), "site": (SITE,), "out": out} | SMALL | settings)


def curve(folder: Path, name: str = "loss") -> dict[int, float]:
    """Rows -> what was logged."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return dict(sorted((event.step, event.value) for event in events.Scalars(name)))


def hold_to(folder: Path, reference: Path, exactly: bool = False) -> None:
    """Two runs logged the same curve and saved the same SAE."""
    ours, theirs = curve(folder), curve(reference)
    assert ours.keys() == theirs.keys() and len(ours) == 60
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), **({"rtol": 0, "atol": 0} if exactly else CLOSE))
    a, b = (load_file(path / "sae.safetensors") for path in (folder, reference))
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-2, "atol": 1e-3}))


# Which values are kept


def select_everywhere(ranks: Ranks) -> list[tuple[str, int, bool, Any]]:
    """For every kind of values and every k: whether the twins agree, and this rank's codes."""
    found = []
    for kind in KINDS:
        pre = pre_of(kind)
        mine = pre[len(pre) * ranks.rank**2 // ranks.world**2 : len(pre) * (ranks.rank + 1) ** 2 // ranks.world**2].contiguous()
        for k in (1, 4, 64):
            if len(pre) >= ranks.world:
                fast, plain = (select(mine, k * len(pre), ranks) for select in (select_batch_topk_of_ranks, select_batch_topk_of_ranks_plain))
                same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
                found.append((kind, k, same, (fast.start.diff(), fast.latent, fast.value)))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_batch_topk_over_ranks_is_that_of_one_process(on_ranks, world):
    for of_ranks in zip(*on_ranks(world, select_everywhere), strict=True):
        kind, k, *_ = of_ranks[0]
        whole = select(pre_of(kind), BatchTopK(k * len(pre_of(kind))))
        for ours, theirs in zip((torch.cat(parts) for parts in zip(*(codes for *_, codes in of_ranks), strict=True)), whole_of(whole), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert all(same for _, _, same, _ in of_ranks), "the twins differ"


def whole_of(codes) -> tuple[torch.Tensor, ...]:
    return codes.start.diff(), codes.latent, codes.value


# Steps


def some_steps(ranks: Ranks, arch: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
    """Losses and final state after 40 steps, some of them with dead latents."""
    recipe = TrainConfig((), (), Path(), lr=4e-3, dead_after=300)
    sae.trainee.START_ROWS = 32  # of the first rank, however many there are
    has_k = arch in WITH_K or arch == "jumprelu"
    config = SaeConfig(arch, D_IN, 64, PER_ROW if has_k else 0, sparsity=1.0 if has_k else 0.01)
    trainee = Trainee(config, recipe, torch.device("cpu"), ranks)
    with torch.no_grad():
        trainee.sae.b_enc[:20] = -7.0
    losses = []
    for step in range(40):
        x = torch.randn(96, D_IN, generator=torch.Generator().manual_seed(step))
        x[:48] *= 3  # so that the ranks' parts differ in all that is summed
        losses.append(trainee.step(x[ranks.part(96).start : ranks.part(96).stop]))
    return losses, {name: tensor.clone() for name, tensor in trainee.state().tensors.items()}, trainee.running


@pytest.mark.parametrize("arch", ARCHS)
def test_ranks_end_every_step_with_the_same_bits_and_with_those_of_one_process_nearly(on_ranks, arch):
    losses, state, running = some_steps(Ranks(), arch)
    if arch in WITH_K:
        assert running["aux_loss"] > 0, "no latent was dead"
    for world in (2, 3):
        first, *others = on_ranks(world, some_steps, arch)
        for other in others:
            assert other[0] == first[0] and other[2] == first[2]
            assert all(torch.equal(other[1][name], first[1][name]) for name in state)
        np.testing.assert_allclose(first[0], losses, rtol=1e-4)
        assert first[2] == pytest.approx(running, rel=1e-3)
        assert torch.equal(first[1]["rows_since_fired"], state["rows_since_fired"])
        for name in state:
            torch.testing.assert_close(first[1][name], state[name], rtol=1e-3, atol=1e-4)


# Runs


def run(ranks: Ranks, config: TrainConfig) -> list[Any]:
    return train(config, ranks=ranks)


@pytest.fixture(scope="module")
def undisturbed(planted, tmp_path_factory) -> Path:
    """What one process makes of three lanes. Read only."""
    out = tmp_path_factory.mktemp("undisturbed") / "sae"
    train(config_for(planted, out, lanes=3, dead_after=2000))
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_learn_what_one_process_learns(on_ranks, planted, undisturbed, tmp_path, world):
    results = on_ranks(world, run, config_for(planted, tmp_path / "sae", lanes=3, dead_after=2000))
    assert all(result == results[0] for result in results)
    assert results[0][0].rows == SMALL["rows"]
    hold_to(tmp_path / "sae", undisturbed)
    assert not [*tmp_path.rglob("checkpoint.safetensors"), *tmp_path.rglob("run.json")]
    assert train(config_for(planted, tmp_path / "sae", dead_after=2000)) == results[0], "a finished run is left alone, whoever made it"


def test_the_number_of_workers_is_the_number_of_lanes_unless_one_says(on_ranks, planted, tmp_path):
    on_ranks(2, run, config_for(planted, tmp_path / "two"))
    train(config_for(planted, tmp_path / "one", lanes=2))
    hold_to(tmp_path / "two", tmp_path / "one")
    train(config_for(planted, tmp_path / "other"))
    assert curve(tmp_path / "other") != curve(tmp_path / "one")


def what_is_raised(ranks: Ranks, config: TrainConfig) -> str:
    with pytest.raises(HearsaeError) as error:
        train(config, ranks=ranks)
    return str(error.value)


def test_what_the_first_rank_refuses_all_refuse(on_ranks, planted, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "sae")
    messages = on_ranks(2, what_is_raised, config_for(planted, tmp_path / "sae", lanes=3, dead_after=3000))
    assert messages[0] == messages[1] and "is of another run: dead_after is 2000 there and 3000 here" in messages[0]
    messages = on_ranks(3, what_is_raised, config_for(planted, tmp_path / "new", lanes=2))
    assert set(messages) == {"3 workers can't share 2 lanes: use 2 --workers, or another --out with more --lanes"}


class SlowStore(ActivationStore):
    def read_into(self, site, start, out):
        time.sleep(0.02)
        super().read_into(site, start, out)


def run_slowly(ranks: Ranks, config: TrainConfig) -> None:
    train(config, [SlowStore.open(path) for path in config.store], ranks)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(on_ranks, planted, undisturbed, tmp_path, killed):
    config = config_for(planted, tmp_path / "2", lanes=3, dead_after=2000, checkpoint_every=1500, buffer_mib=1)
    straight = config_for(planted, tmp_path / "straight", lanes=3, dead_after=2000, checkpoint_every=1500, buffer_mib=1)
    on_ranks(2, run, straight)
    processes = start_ranks(2, str(tmp_path / "meeting"), run_slowly, config)
    checkpoint = config.out / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    pid = processes[killed].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if rank == killed else 1 for rank in range(2)]
    assert checkpoint.exists() and not list(config.out.rglob("train.json"))

    for world in (1, 3):
        shutil.copytree(config.out, tmp_path / str(world))
        on_ranks(world, run, replace(config, out=tmp_path / str(world), lanes=None))
        hold_to(tmp_path / str(world), straight.out)
    on_ranks(2, run, config)
    hold_to(config.out, straight.out, exactly=True)


def test_following_ranks_learn_what_one_process_learns(on_ranks, planted, tmp_path):
    settings = {"lanes": 2, "follow": True, "follow_timeout": 30.0}
    train(config_for(planted, tmp_path / "one", **settings))
    on_ranks(2, run, config_for(planted, tmp_path / "two", **settings))
    hold_to(tmp_path / "two", tmp_path / "one")


# Parts of a grid


def test_parts_of_a_grid_trained_apart_are_the_grid(planted, tmp_path):
    grid = {"site": (SITE, OTHER), "seed": (0, 1), "d_sae": (32,), "checkpoint_every": 1500}
    together = train(config_for(planted, tmp_path / "together", **grid))
    config = config_for(planted, tmp_path / "apart", **grid)
    for part in (slice(0, None, 3), slice(1, None, 3)):
        assert train(config, only=part) == []
    assert len(list(config.out.rglob("checkpoint.safetensors"))) == 3 and not (config.out / "train.json").exists()
    for ours, theirs in zip(train(config), together, strict=True):
        hold_to(Path(ours.dir), Path(theirs.dir), exactly=True)
        assert (ours.fvu, ours.l0, ours.dead_fraction, ours.rows) == (theirs.fvu, theirs.l0, theirs.dead_fraction, theirs.rows)
    assert not list(config.out.rglob("checkpoint.safetensors"))
