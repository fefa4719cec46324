"""The static page of scans with phones: what `export` writes for them, and what a browser makes of it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from said import say
from test_explorer import CLICK_S, OPTIONS, SITE, SOUNDS, WIDTH, make_world, registered

from analysis.evidence import PhoneEvidence
from analysis.explorer.evidence_data import luminance, tinted
from analysis.explorer.export import export
from analysis.explorer.reuse import made_from
from analysis.features import open_features
from analysis.scan import scan
from analysis.scan_folder import Scan
from cache.store import ActivationStore

HOSTILE_PHONE = "<img src=x onerror=document.title='owned'>"


def make_phone_world(root: Path) -> Path:
    """The explorer tests' world with phones in its store: the hostile one around the click, on which feature 0 rises."""
    world = make_world(root)
    store = ActivationStore.open(world / "acts.zarr")
    spoken = [(HOSTILE_PHONE, CLICK_S - 0.2, CLICK_S + 0.2), ("M", 0.1, 0.9), ("IY", 1.6, 2.2), ("SIL", 2.2, 2.9)]
    words = [(clip, 0.1, 0.9, "word") for clip in range(len(SOUNDS))]
    say(store, words, [(clip, start, end, label) for clip in range(len(SOUNDS)) for label, start, end in spoken])
    for name, spec in {"neurons": f"neurons:{SITE}", "latents": f"sae:{world / 'sae'}"}.items():
        shutil.rmtree(world / name)
        scan(store, spec, world / name, OPTIONS)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phone_world(tmp_path_factory.mktemp("phones") / "world")


@pytest.fixture(scope="module")
def page(world: Path) -> Path:
    export([world / "neurons", world / "latents", world / "tokens"], world / "page", audio="none")
    return world / "page"


def facts_of(page: Path, scan_name: str, feature: int) -> dict:
    return registered(page, f"{scan_name}/block{feature // 16}")["features"][feature % 16]


def test_list_names_the_phone_that_each_feature_tells_best(world: Path, page: Path) -> None:
    labels = registered(page, "index")["scans"][0]["phones"]["labels"]
    rows, scores = registered(page, "scan0/list"), PhoneEvidence.open(Scan.open(world / "neurons")).scores
    assert [labels[phone] if phone >= 0 else None for phone in rows["phone"]] == scores["phone"].to_pylist()
    assert labels[rows["phone"][0]] == HOSTILE_PHONE and rows["auc"][0] > 0.9
    for name in ("auc", "f1", "polysemanticity"):
        assert rows[name] == [None if value is None else pytest.approx(value, rel=1e-2) for value in scores[name].to_pylist()]


def test_names_in_the_chart_have_contrast(page: Path) -> None:
    phones = registered(page, "index")["scans"][0]["phones"]
    for colour, dark in zip(phones["colour"], phones["dark"], strict=True):
        high, low = (1, luminance(colour)) if dark else (luminance(colour), 0)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_phones_stand_by_articulation_with_their_base_rates(page: Path) -> None:
    phones = registered(page, "index")["scans"][0]["phones"]
    assert phones["labels"] == ["IY", "M", HOSTILE_PHONE, "SIL"]
    assert [phones["groups"][group]["name"] for group in phones["group"]] == ["vowels", "nasals", "outside ARPAbet", "silence"]
    assert sum(phones["base"]) == pytest.approx(1, abs=1e-3) and max(phones["base"]) == phones["base"][1]


def test_mix_is_that_of_the_evidence(world: Path, page: Path) -> None:
    evidence, labels = PhoneEvidence.open(Scan.open(world / "neurons")), registered(page, "index")["scans"][0]["phones"]["labels"]
    for feature in (0, 7, WIDTH - 1):
        mix, shown = evidence.mix(feature), facts_of(page, "scan0", feature)["mix"]
        assert shown["edges"] == pytest.approx(mix.edges.tolist(), rel=1e-4)
        found = np.zeros_like(mix.frames)
        for number, flat in enumerate(shown["frames"]):
            for phone, frames in zip(flat[::2], flat[1::2], strict=True):
                found[number, mix.phones.index(labels[phone])] = frames
        np.testing.assert_array_equal(found, mix.frames)


def test_scores_come_with_their_intervals(world: Path, page: Path) -> None:
    row, shown = PhoneEvidence.open(Scan.open(world / "neurons")).scores.slice(0, 1).to_pylist()[0], facts_of(page, "scan0", 0)["scores"]
    assert shown["phone"] == HOSTILE_PHONE and shown["phone_class"] == row["phone_class"]
    for name in ("auc", "f1", "onset_ms"):
        assert shown[name] == [
            row[column] if row[column] is None else pytest.approx(row[column], rel=1e-3) for column in (name, f"{name}_lo", f"{name}_hi")
        ]
    assert shown["precision"] == pytest.approx(row["precision"], rel=1e-3)


def test_runs_are_those_of_the_scan(world: Path, page: Path) -> None:
    row, shown = pq.read_table(world / "neurons" / "features.parquet").slice(0, 1).to_pylist()[0], facts_of(page, "scan0", 0)
    assert shown["runs"] == row["runs"] == len(SOUNDS)
    for name in ("run_frames_mean", "run_frames_median", "rise_frames_mean", "fall_frames_mean"):
        assert shown[name] == pytest.approx(row[name], rel=1e-4)


def test_features_like_it_are_the_nearest_rows_and_the_strongest_partners(world: Path, page: Path) -> None:
    store = ActivationStore.open(world / "acts.zarr")
    rows = open_features(f"sae:{world / 'sae'}", store).dictionary.W_dec.detach().double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    partners = Scan.open(world / "latents").coactivation.to_pylist()
    for latent in (0, 31, 63):
        shown = facts_of(page, "scan1", latent)
        assert [other for other, _ in shown["nearest"]] == np.argsort(-cosines[latent])[:8].tolist()
        assert shown["nearest"][0][1] == pytest.approx(cosines[latent].max(), abs=1e-2)
        wanted = [(row["other"], row["both"]) for row in partners if row["feature"] == latent and row["rank"] < 8]
        assert [(other, both) for other, both, _, _ in shown["together"]] == wanted
    assert "nearest" not in facts_of(page, "scan0", 0)


def test_scan_without_phones_has_none_on_the_page(page: Path) -> None:
    assert registered(page, "index")["scans"][2]["phones"] is None
    assert not {"phone", "auc"} & set(registered(page, "scan2/list"))
    assert "scores" not in facts_of(page, "scan2", 0)


def test_page_to_be_served_is_made_anew_when_the_phones_change(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "neurons", tmp_path / "neurons")
    scans = [Scan.open(tmp_path / "neurons").path]
    before = made_from(scans, {})
    (tmp_path / "neurons" / "phone_scores.parquet").unlink()
    assert made_from(scans, {}) != before


@pytest.mark.parametrize(("white", "wanted"), [(0.0, "#336699"), (0.5, "#99b2cc"), (1.0, "#ffffff")])
def test_tints_lie_between_a_colour_and_white(white: float, wanted: str) -> None:
    assert tinted("#336699", white) == wanted
