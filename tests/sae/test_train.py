"""Training: it finds what is there, and a run that was stopped goes on as if it had not been."""

import json
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import plan_of
from planted_rows import D_IN, FEATURES, OFFSET, OTHER, PER_ROW, SITE, planted_features, planted_rows, planted_store
from safetensors.torch import load_file

from cache.errors import HearsaeError
from cache.store import ActivationStore
from sae.metrics import evaluate
from sae.models import ARCHS, WITH_K, SaeConfig, load_dictionary
from sae.objectives import _Jump
from sae.selection import BatchTopK, select
from sae.train import learning_rate_factor, train
from sae.train_config import TrainConfig
from sae.trainee import Trainee

SMALL = {"d_sae": (64,), "k": (PER_ROW,), "batch": 256, "threads": 1, "plots": False, "quiet": True, "lr": 4e-3}


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> ActivationStore:
    """15,000 rows at two sites. Read only."""
    return planted_store(tmp_path_factory.mktemp("planted") / "acts.zarr")


def config_for(store: ActivationStore, out: Path, **settings) -> TrainConfig:
    return TrainConfig(**{"store": (store.path,), "site": (SITE,), "out": out, "rows": 256 * 60} | SMALL | settings)


@pytest.mark.parametrize(
    ("arch", "found", "settings"),
    [
        ("batchtopk", 0.85, {}),
        ("topk", 0.85, {}),
        ("matryoshka", 0.6, {}),  # its first latents take what they can of everything
        ("relu", 0.95, {"sparsity": (1.0,)}),
        ("tied", 0.4, {}),
        ("jumprelu", 0.75, {}),
        ("jumprelu-tanh", 0.5, {}),
        ("gated", 0.75, {}),
    ],
)
def test_planted_features_are_found(planted, tmp_path, arch, found, settings):
    result = train(config_for(planted, tmp_path, arch=(arch,), rows=200_000, dead_after=10_000, **settings))[0]
    sae = load_dictionary(result.dir)
    best = (planted_features() @ sae.W_dec.numpy().T).max(axis=1)
    assert (best > 0.9).mean() >= found
    measured = evaluate(sae, planted)
    assert measured.fvu < (0.35 if arch in ("tied", "relu", "matryoshka") else 0.1)
    if sae.config.k:
        assert measured.l0 == pytest.approx(PER_ROW, rel=0.05)
    assert measured.l0 < 3 * PER_ROW
    assert result.fvu == pytest.approx(measured.fvu, rel=0.3)
    assert result.l0 == pytest.approx(measured.l0, rel=0.1)
    assert np.linalg.norm(sae.W_dec.numpy(), axis=1) == pytest.approx(np.ones(64), abs=1e-5)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in WITH_K])
def test_what_training_computes_is_what_is_saved(arch):
    """The finished dictionary reconstructs as the last forward pass did, whatever parameters training had."""
    sae = SaeConfig(arch, D_IN, 64, sparsity=0.5 if "jump" not in arch else 0.003)
    trainee = Trainee(sae, TrainConfig((), (), Path(), lr=4e-3), torch.device("cpu"))
    x = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        trainee.step(x, progress=0.5)
    for dense in (False, True):
        forward = trainee.objective.forward(x, x, 512, x.square().sum(), 0.5, dense)
        finished = trainee.dictionary(rows=1)
        torch.testing.assert_close(finished.reconstruct(x)[0], x - forward.residual, rtol=1e-3, atol=1e-3)
        assert float((x - finished(x)).detach().square().sum()) == pytest.approx(float(forward.squared_error), rel=1e-3)


@pytest.mark.parametrize("arch", ["relu", "tied", "jumprelu", "gated"])
def test_sparse_and_dense_steps_are_the_same(arch):
    """Once few latents fire, the sparse loops take over from dense products: losses and gradients must not notice."""
    trainee = Trainee(SaeConfig(arch, D_IN, 64, sparsity=0.5), TrainConfig((), (), Path(), lr=4e-3), torch.device("cpu"))
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
    trainee.objective.start(x)
    if arch == "jumprelu":
        trainee.objective.bandwidth = 0.5  # or hardly a value lies within it
    found = []
    for dense in (False, True):
        forward = trainee.objective.forward(x, x, 300, x.square().sum(), 0.5, dense)
        gradients = torch.autograd.grad(forward.error + forward.penalty, trainee.parameters)
        found.append((forward.error.detach(), forward.penalty.detach(), forward.residual, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_the_estimator_has_the_derivatives_of_the_paper():
    """2407.14435, eqs. 11 and 12: -(threshold / bandwidth) and -1 / bandwidth within the band, nothing outside."""
    pre, threshold = torch.tensor([0.2, 0.95, 1.05, 3.0]).requires_grad_(), torch.ones(4, requires_grad=True)
    value, active = _Jump.apply(pre, threshold, 0.2)
    assert value.tolist() == pytest.approx([0, 0, 1.05, 3.0])
    assert active.tolist() == [0, 0, 1, 1]
    d_pre, d_threshold = torch.autograd.grad(2 * value.sum() + 3 * active.sum(), (pre, threshold))
    assert d_pre.tolist() == [0, 0, 2, 2]
    assert d_threshold.tolist() == pytest.approx([0, -(2 + 3) / 0.2, -(2 + 3) / 0.2, 0])


def test_a_matryoshka_learns_to_reconstruct_from_its_first_latents_alone(planted, tmp_path):
    fvu = {}
    for arch in ("matryoshka", "batchtopk"):
        sae = load_dictionary(train(config_for(planted, tmp_path / arch, arch=(arch,), rows=100_000))[0].dir)
        x = torch.cat([torch.from_numpy(planted.read_clip(SITE, clip)) for clip in range(8)]).float()
        z = sae.encode(x)
        z[:, 14:] = 0  # the third of the prefixes of 64 latents
        fvu[arch] = float((x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu["matryoshka"] < 0.75 * fvu["batchtopk"]


def planted_pair(site: str, clip: int, n: int) -> np.ndarray:
    """Rows of two sites that have the features of each row in common."""
    rows = planted_rows(SITE, clip, n) - OFFSET
    return rows if site == SITE else 3 * rows @ np.linalg.qr(np.random.default_rng(5).standard_normal((D_IN, D_IN)))[0] + 1


@pytest.mark.parametrize("arch", ["batchtopk", "relu"])
def test_a_transcoder_predicts_one_site_from_another(tmp_path, arch):
    store = planted_store(tmp_path / "acts.zarr", rows_of=planted_pair)
    (result,) = train(config_for(store, tmp_path / "out", target=OTHER, arch=(arch,), rows=150_000))
    transcoder = load_dictionary(result.dir)
    assert (transcoder.config.sites, transcoder.config.targets, transcoder.config.kind) == ((SITE,), (OTHER,), "transcoder")
    x, y = (torch.cat([torch.from_numpy(store.read_clip(site, clip)) for clip in range(8)]).float() for site in (SITE, OTHER))
    fvu = float((y - transcoder(x)).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.25
    assert fvu == pytest.approx(result.fvu, rel=0.3)


def test_a_crosscoder_has_one_latent_for_what_two_sites_share(tmp_path):
    store = planted_store(tmp_path / "acts.zarr", rows_of=planted_pair)
    config = config_for(store, tmp_path / "out", site=(SITE, OTHER), crosscoder=True, rows=200_000, dead_after=10_000)
    (result,) = train(config)
    crosscoder = load_dictionary(result.dir)
    assert crosscoder.config.sites == crosscoder.config.targets == (SITE, OTHER)
    first, second = crosscoder.W_dec.split(D_IN, dim=1)
    rotated = planted_features() @ np.linalg.qr(np.random.default_rng(5).standard_normal((D_IN, D_IN)))[0]
    here = planted_features() @ torch.nn.functional.normalize(first, dim=1).numpy().T
    there = rotated @ torch.nn.functional.normalize(second, dim=1).numpy().T
    assert (np.minimum(here, there).max(axis=1) > 0.9).mean() > 0.7  # the same latent at both sites
    x = torch.cat([torch.cat([torch.from_numpy(store.read_clip(site, clip)).float() for site in (SITE, OTHER)], dim=1) for clip in range(8)])
    for columns in (slice(0, D_IN), slice(D_IN, 2 * D_IN)):
        y = x[:, columns]
        assert float((y - crosscoder(x)[:, columns]).square().sum() / (y - y.mean(0)).square().sum()) < 0.2


def test_values_are_in_the_units_of_the_store(planted, tmp_path):
    sae = load_dictionary(train(config_for(planted, tmp_path, rows=150_000))[0].dir)
    strength = np.zeros((FEATURES, FEATURES))
    np.fill_diagonal(strength, 1.5)
    rows = torch.from_numpy(strength @ planted_features() + OFFSET).float()
    matching = (planted_features() @ sae.W_dec.numpy().T).argmax(axis=1)
    values = sae.encode(rows)[torch.arange(FEATURES), matching]
    assert float(values.median()) == pytest.approx(1.5, rel=0.15)


class DyingStore(ActivationStore):
    """Fails after so many reads, as a disk that goes away does."""

    reads_left = 10**9

    def read_into(self, site, start, out):
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("gone")
        super().read_into(site, start, out)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_that_died_goes_on_bit_for_bit(planted, tmp_path, arch):
    # Dead latents, several blocks an epoch, several epochs: all that a checkpoint must remember is in play.
    settings = {"arch": (arch,), "rows": 256 * 150, "dead_after": 2000, "checkpoint_every": 5000, "buffer_mib": 1, "d_sae": (96,), "seed": (0, 1)}
    straight = train(config_for(planted, tmp_path / "straight", **settings))
    config = config_for(planted, tmp_path / "died", **settings)
    dying = DyingStore.open(planted.path)
    dying.reads_left = 2 * 32
    with pytest.raises(OSError, match="gone"):
        train(config, [dying])
    assert len(list(config.out.rglob("checkpoint.safetensors"))) == 2
    assert not list(config.out.rglob("config.json"))
    resumed = train(config)
    assert not [*config.out.rglob("checkpoint.safetensors"), *config.out.glob("run.json")]
    for ours, theirs in zip(resumed, straight, strict=True):
        a, b = (load_file(Path(result.dir) / "sae.safetensors") for result in (ours, theirs))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert (ours.fvu, ours.l0, ours.dead_fraction, ours.rows) == (theirs.fvu, theirs.l0, theirs.dead_fraction, theirs.rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_sae_of_a_grid_is_as_if_trained_alone(planted, tmp_path, threads):
    """Side by side, too: two threads take up two SAEs, not halves of a product."""
    grid = {"d_sae": (32, 64), "k": (2, PER_ROW), "seed": (0, 1), "dead_after": 3000, "threads": threads}
    results = train(config_for(planted, tmp_path / "grid", **grid))
    assert len({result.dir for result in results}) == len(results) == 8
    for result in results[::3]:
        alone = tmp_path / "alone" / Path(result.dir).name
        train(config_for(planted, alone, d_sae=(result.d_sae,), k=(result.k,), seed=(result.seed,), dead_after=3000))
        a, b = (load_file(Path(folder) / "sae.safetensors") for folder in (result.dir, alone))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_grid_over_sites_learns_each_from_its_own_rows(planted, tmp_path):
    results = train(config_for(planted, tmp_path, site=(SITE, OTHER), rows=60_000))
    assert [load_dictionary(result.dir).config.site for result in results] == [SITE, OTHER]
    for result in results:
        assert evaluate(load_dictionary(result.dir), planted).fvu < 0.7


def test_dead_latents_are_brought_back(planted):
    def alive_after(aux: float) -> int:
        trainee = Trainee(
            SaeConfig("batchtopk", D_IN, 64, PER_ROW), TrainConfig((), (), Path(), lr=2e-3, dead_after=1000, aux=aux), torch.device("cpu")
        )
        with torch.no_grad():
            trainee.sae.b_enc[:32] = -2.5  # below the cut of nearly every batch, though not of every row below zero
        x = torch.cat([torch.from_numpy(planted.read_clip(SITE, clip)) for clip in range(8)]).float()
        x = (x - x.mean(0)) * (D_IN / (x - x.mean(0)).square().sum(1).mean()).sqrt()
        for step in range(300):
            trainee.step(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:256]])
        return int((trainee.rows_since_fired[:32] < 1000).sum())

    assert alive_after(aux=0.0) <= 6
    assert alive_after(aux=1 / 32) >= 20


def test_what_lies_beside_the_result_tells_how_it_was_made(planted, tmp_path):
    out = tmp_path / "sae"
    results = train(config_for(planted, out, seed=(7,), plots=True))
    assert (out / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    config = load_dictionary(out).config
    assert (config.site, config.seed, config.rows, config.store) == (SITE, 7, 256 * 60, ("acts.zarr",))
    assert (config.model_sha256, config.plan_hash) == (planted.header.model["sha256"], (planted.header.plan["hash"],))
    written = json.loads((out / "train.json").read_text())
    assert written["config"]["batch"] == 256
    assert written["runs"] == [results[0]._asdict()]
    needed = {"dir", "site", "arch", "d_sae", "k", "seed", "rows", "seconds", "rows_per_s", "wait_fraction", "fvu", "l0", "dead_fraction"}
    assert set(written["runs"][0]) >= needed
    assert list((out / "tb").glob("events*"))


@dataclass(frozen=True)
class AsCommand(TrainConfig):
    as_json: bool = False


def test_a_finished_run_is_left_alone(planted, tmp_path):
    config = config_for(planted, tmp_path)
    first = train(config)
    before = (tmp_path / "sae.safetensors").stat().st_mtime_ns
    assert train(replace(config, threads=2, checkpoint_every=77)) == first
    assert train(AsCommand(**vars(config), as_json=True)) == first
    assert (tmp_path / "sae.safetensors").stat().st_mtime_ns == before


def test_the_output_of_another_run_is_refused(planted, tmp_path):
    train(config_for(planted, tmp_path))
    with pytest.raises(HearsaeError, match=r"is of another run: k is .*3.* there and .*2.* here"):
        train(config_for(planted, tmp_path, k=(2,)))


def test_the_checkpoint_of_another_grid_is_refused(planted, tmp_path):
    dying = DyingStore.open(planted.path)
    dying.reads_left = 33
    with pytest.raises(OSError, match="gone"):
        train(config_for(planted, tmp_path, rows=256 * 500, checkpoint_every=256, buffer_mib=1), [dying])
    with pytest.raises(HearsaeError, match=r"run.json is of another run: seed is \[0\] there and \[1, 2\] here"):
        train(config_for(planted, tmp_path, rows=256 * 500, buffer_mib=1, seed=(1, 2)))
    (tmp_path / "run.json").unlink()
    with pytest.raises(HearsaeError, match=r"checkpoint.safetensors is of another run: seed is \[0\] there and \[7\] here"):
        train(config_for(planted, tmp_path, rows=256 * 500, buffer_mib=1, seed=(7,)))
    (tmp_path / "run.json").unlink()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HearsaeError, match=r"checkpoint.safetensors is damaged"):
        train(config_for(planted, tmp_path, rows=256 * 500, buffer_mib=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": (65,)}, "k = 65 is not between 1 and d_sae = 64"),
        ({"k": (3, 3)}, "--k: give at least one value, and none twice"),
        ({"site": ()}, "--site: give at least one"),
        ({"rows": 100}, "--rows 100 is less than one batch of 256"),
        ({"site": ("../escape",)}, "is no name of a site"),
        ({"site": ("encoder.blocks.7",)}, "has no site 'encoder.blocks.7'"),
        ({"arch": ("relu",), "k": (1, 2)}, "k has no effect"),
        ({"sparsity": (1.0,)}, "--sparsity has no effect on batchtopk"),
        ({"arch": ("relu",), "sparsity": (-1.0,)}, "not negative"),
        ({"arch": ("magic",)}, "no SAE architecture 'magic'"),
        ({"target": SITE}, "a transcoder reads one site and reconstructs another"),
        ({"target": OTHER, "site": (SITE, "encoder.blocks.2"), "crosscoder": True}, "a crosscoder has no target"),
        ({"crosscoder": True}, "two sites or more"),
        ({"lr": 0.0}, "--lr 0.0 is not a positive number"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"warmup": 2.0}, "between 0 and 1"),
        ({"lr": 1e30}, "diverged"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(planted, tmp_path, settings, message):
    with pytest.raises(HearsaeError, match=message) as error:
        train(config_for(planted, tmp_path, **settings))
    assert "\n" not in str(error.value)


def test_rows_that_are_all_equal_are_refused(tmp_path):
    store = planted_store(tmp_path / "acts.zarr", 60.0, rows_of=lambda site, clip, n: np.full((n, D_IN), 0.3))
    with pytest.raises(HearsaeError, match=f"all 3000 rows of {SITE} are equal"):
        train(config_for(store, tmp_path / "out", rows=256))


def test_an_output_folder_that_cannot_be_is_refused_in_one_line(planted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HearsaeError, match="can't write"):
        train(config_for(planted, tmp_path / "file" / "out"))


def test_the_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[10:81] == pytest.approx(np.ones(71))
    assert factors[80:] == pytest.approx(np.arange(20, 0, -1) / 20)


def test_the_threshold_keeps_k_per_row(planted):
    trainee = Trainee(SaeConfig("batchtopk", D_IN, 64, PER_ROW), TrainConfig((), (), Path()), torch.device("cpu"))
    x = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(0))
    trainee.step(x, rate=1e-9)
    sae = trainee.dictionary(rows=512)
    smallest = select((x @ sae.W_enc).detach(), BatchTopK(512 * PER_ROW)).value.min()
    assert float(sae.threshold) == pytest.approx(float(smallest), rel=1e-4)


def test_following_waits_for_a_store_that_is_being_made(planted, tmp_path):
    store = tmp_path / "acts.zarr"
    settings = {"follow": True, "rows": 256 * 4, "follow_timeout": 60.0}

    def make() -> None:
        time.sleep(0.3)
        plan = plan_of([20.0] * 15, chunk_rows=512, shard_rows=2048)
        assert plan.summary() == planted.header.plan
        ActivationStore.create(store, replace(planted.header, sites={}), plan, [])
        time.sleep(0.3)
        planted_store(store)

    maker = threading.Thread(target=make)
    maker.start()
    (live,) = train(replace(config_for(planted, tmp_path / "live", **settings), store=(store,)))
    maker.join()
    (later,) = train(config_for(planted, tmp_path / "later", **settings))
    assert (live.fvu, live.rows) == (later.fvu, later.rows)
    with pytest.raises(HearsaeError, match="there is no activation store at"):
        train(replace(config_for(planted, tmp_path / "never", **settings), store=(tmp_path / "never.zarr",), follow_timeout=0.3))
