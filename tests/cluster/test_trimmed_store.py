"""A store of trimmed windows through the other commands: trained on and scanned as any, refused where whole windows are run."""

import pytest

from analysis.explorer.live import Live
from cache.errors import HearsaeError

pytestmark = pytest.mark.slow
RESIDUAL, NEURONS = "encoder.blocks.2", "encoder.blocks.2.mlp.1"


def test_what_runs_whole_windows_says_so(succeeds, refused, tmp_path):
    store, sae, scan = tmp_path / "acts.zarr", tmp_path / "sae", tmp_path / "scan"
    micro = ["--dataset", "micro", "--split", "test", "--model", "micro", "--no-ray"]
    succeeds("cache", *micro, "--sites", RESIDUAL, NEURONS, "--out", store, "--context", "trimmed")
    succeeds("train", "--store", store, "--site", RESIDUAL, "--d-sae", "192", "--k", "8", "--rows", "8192", "--out", sae)
    assert succeeds("evaluate", "--sae", sae, "--store", store)["results"][0]["rows"] > 0
    assert "is trimmed with a margin of 1 s, but codes are put back into whole windows" in refused(
        "evaluate", "--sae", sae, "--store", store, "--splice"
    )
    whole = tmp_path / "whole.zarr"
    succeeds("cache", *micro, "--sites", RESIDUAL, "--out", whole)
    for command in (["evaluate", "--sae", sae, "--store", whole], ["scan", "--store", whole, "--features", f"sae:{sae}", "--out", scan, "--no-ray"]):
        said = refused(*command)
        assert f"trained on windows that were trimmed with a margin of 1 s; those of {whole} are padded" in said
    succeeds("scan", "--store", store, "--features", f"neurons:{NEURONS}", "--out", scan, "--no-ray")
    with pytest.raises(HearsaeError, match="is of a store that is trimmed with a margin of 1 s: live, sound is heard in whole windows"):
        Live.open([scan])
