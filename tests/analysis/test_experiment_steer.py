"""`hearsae experiment steer` and `ablate` on micro, and on a Whisper of random weights."""

import pytest
import torch
from conftest import write_tiny_whisper

from analysis.experiments.activity import activity
from analysis.experiments.changes import Steered, Stretch
from analysis.experiments.effects import Tail, measure, text_loss
from analysis.experiments.speech import Speech, encode, in_this_process, worker_model
from analysis.interventions import edit_site, transcribe_encoded
from analysis.steering import Edit, at_positions, open_steerable, steering
from cluster.cli import main
from sae.models import Dictionary, SaeConfig
from sae.train import train
from sae.train_config import TrainConfig

SITE = "encoder.blocks.2"
CLIPS = ("--split", "test", "--limit", "6", "--no-ray")
"""micro's."""


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """A small SAE of micro's residual stream."""
    root = tmp_path_factory.mktemp("sae")
    assert main(["cache", "--dataset", "micro", "--model", "micro", "--limit", "50", "--sites", SITE, "--out", str(root / "S"), "--no-ray"]) == 0
    train(TrainConfig(store=(root / "S",), site=(SITE,), d_sae=(384,), k=(16,), rows=60_000, out=root / "SAE"))
    return root / "SAE"


@pytest.fixture(scope="module")
def most_active(sae):
    return activity(Speech("micro", "test", 6), "micro", "auto", f"sae:{sae}", 0, "en", in_this_process).most_active(60)


def test_a_factor_of_one_leaves_every_transcript_and_the_encoder_as_they_are(succeeds, sae, most_active, tmp_path):
    result = succeeds(
        "experiment", "steer", *CLIPS, "--features", f"sae:{sae}", "--feature", *most_active, "--scale", 1, "--controls", 1, "--out", tmp_path / "r"
    )
    assert len(result["rows"]) == 6 * 3
    for row in result["rows"]:
        assert row["after"] == row["before"]
        assert (row["ce_change"], row["output_relative_inside"], row["output_relative_outside"]) == (0, 0, 0)
    assert result["summary"]["by_amount"]["scale 1"] == result["summary"]["unchanged"] | {
        "site": result["summary"]["by_amount"]["scale 1"]["site"],
        "output": result["summary"]["by_amount"]["scale 1"]["output"],
    }
    speech, loaded = Speech("micro", "test", 6), worker_model("micro")
    before = encode(loaded, speech, speech.clips)
    with steering(loaded.module, open_steerable(f"sae:{sae}", loaded), [Edit(most_active, "scale", 1.0)]):
        assert torch.equal(encode(loaded, speech, speech.clips), before)


def test_removing_the_most_active_features_breaks_transcripts_and_random_ones_do_less(succeeds, sae, most_active, tmp_path):
    result = succeeds("experiment", "ablate", *CLIPS, "--features", f"sae:{sae}", "--feature", *most_active, "--out", tmp_path / "r")
    summary = result["summary"]
    removed, control = summary["by_amount"]["scale 0"], summary["control"]["by_amount"]["scale 0"]
    assert summary["unchanged"]["wer"] < 0.05
    assert removed["wer"] > 0.2 and removed["changed"] > 0.5
    assert control["random features"]["wer"] < removed["wer"] / 2
    assert control["random features"]["ce_change"] < removed["ce_change"] / 2
    assert control["random direction"]["site"]["relative"] == pytest.approx(removed["site"]["relative"], rel=1e-3)
    assert not any(set(one) & set(most_active) for one in summary["control"]["features"])
    assert (tmp_path / "r" / "steering.png").exists()


def test_a_stretch_of_time_is_where_the_edit_holds():
    speech, loaded = Speech("micro", "test", 3), worker_model("micro")
    change = Steered(SITE, f"neurons:{SITE}", (Edit(tuple(range(48)), "set", 3.0),), "auto")

    def rows_where(stretch):
        stretch.check(SITE, speech.clips)
        return [changed for _, changed in measure(speech, "micro", "auto", [change], stretch, "en", False, speech.clips)]

    whole, part, everywhere = (rows_where(stretch) for stretch in (Stretch(), Stretch(0.2, 0.5), Stretch(everywhere=True)))
    for clip, in_clip, in_part, in_all in zip(speech.clips, whole, part, everywhere, strict=True):
        assert (in_clip.site.rows, in_part.site.rows, in_all.site.rows) == (clip.n_frames, 15, loaded.dims.n_audio_ctx)
        assert (in_clip.inside.rows, in_clip.outside.rows) == (clip.n_frames, 1500 - clip.n_frames)
        assert in_part.loss < in_clip.loss
        assert in_part.inside.moved / in_part.inside.rows > 3 * in_part.outside.moved / in_part.outside.rows
    assert Stretch(end_s=100.0).frames(speech.clips[0], 1500) == Stretch().frames(speech.clips[0], 1500)
    assert Stretch(20.0, 25.0).frames(speech.clips[0], 1500) == (speech.clips[0].n_frames,) * 2


def test_each_feature_alone_is_ranked_against_random_ones(succeeds, tmp_path):
    """A dictionary of which two latents write much and the others next to nothing."""
    loaded = worker_model("micro")
    planted = Dictionary(SaeConfig(arch="relu", d_in=96, d_sae=12, site=SITE, model_sha256=loaded.sha256))
    planted.init_parameters(torch.Generator().manual_seed(0))
    planted.W_dec.data *= torch.tensor([1e-3, 1e-3, 3.0, 1e-3, 1e-3, 3.0, *[1e-3] * 6])[:, None]
    planted.save(tmp_path / "planted")
    features = ("--features", f"sae:{tmp_path / 'planted'}", "--split", "test", "--limit", 4, "--no-ray", "--out", tmp_path / "r")
    summary = succeeds("experiment", "ablate", *features, "--each", "--feature", *range(6))["summary"]
    ranking, control = summary["ranking"], summary["control"]["ranking"]
    damage = [row["ce_change"] for row in ranking]
    assert len(ranking) == len(control) == 6 and damage == sorted(damage, reverse=True)
    assert {row["feature"] for row in ranking[:2]} == {2, 5} and {row["feature"] for row in control} == set(range(6, 12))
    assert damage[1] > 10 * max(abs(row["ce_change"]) for row in [*ranking[2:], *control])
    first = ranking[0]["feature"]
    alone = succeeds("experiment", "ablate", *features, "--feature", first, "--controls", 1)["summary"]
    assert alone["by_amount"]["scale 0"]["ce_change"] == pytest.approx(damage[0], abs=1e-6)


def test_a_whole_site_is_put_out(succeeds, tmp_path):
    result = succeeds("experiment", "ablate", *CLIPS, "--site", SITE, "--mode", "mean", "--out", tmp_path / "r")["summary"]
    assert result["ablated"]["wer"] > 0.8 and result["ablated"]["ce_change"] > result["control"]["random direction"]["ce_change"]
    zero = succeeds("experiment", "ablate", *CLIPS, "--site", "decoder.blocks.0.cross_attn", "--out", tmp_path / "r")["summary"]
    assert zero["ablated"]["ce_change"] > 0.5 and zero["ablated"]["output"]["inside"] is None


@pytest.mark.slow
def test_a_decoder_site_is_steered_at_all_tokens(succeeds, refused, tmp_path):
    edit = ("--features", "neurons:decoder.blocks.1", "--feature", *range(20), "--add", "50", "--controls", "1", "--out", tmp_path / "r")
    summary = succeeds("experiment", "steer", *CLIPS, *edit, "--limit", 2)["summary"]
    assert summary["where"] == "at all tokens" and summary["by_amount"]["add 50"]["ce_change"] > 0.1
    assert "no frames" in refused("experiment", "steer", *CLIPS, *edit, "--end", "0.5")


def test_an_encoder_alone_is_measured_at_its_output(succeeds, tmp_path):
    encoder = write_tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    model = ("--model", encoder, "--split", "test", "--limit", "2", "--no-ray", "--out", tmp_path / "r")
    result = succeeds("experiment", "steer", *model, "--features", "neurons:encoder.blocks.0", "--feature", 1, "--add", 0, 5)
    assert result["summary"]["measured"] == "encoder output"
    nothing, much = result["summary"]["by_amount"]["add 0"], result["summary"]["by_amount"]["add 5"]
    assert nothing["output"]["inside"]["relative"] == 0 < much["output"]["outside"]["relative"] < much["output"]["inside"]["relative"]
    assert much["wer"] is None and result["rows"][0]["after"] is None
    ranking = succeeds("experiment", "ablate", *model, "--features", "neurons:encoder.blocks.0", "--each", "--top", 3)["summary"]
    assert ranking["by"] == "output_relative" and ranking["ranking"][0]["output_relative"] > 0


def test_the_tail_of_the_encoder_gives_what_the_whole_encoder_gives():
    speech, loaded = Speech("micro", "test", 2), worker_model("micro")
    for site in (SITE, "encoder.blocks.3", "encoder.blocks.1.mlp.1", "encoder.blocks.0.attn", "encoder.ln_post"):
        change = at_positions(lambda rows: rows * 1.5, [(3, 40)])
        tail = Tail(loaded, site)
        with tail.remember():
            plain = encode(loaded, speech, speech.clips)
        with edit_site(loaded.module, site, change):
            whole = encode(loaded, speech, speech.clips)
        assert all(torch.equal(tail.encode(number, change), whole[number]) for number in range(2))
        assert not torch.equal(plain, whole)


def test_the_loss_of_a_text_is_that_of_its_tokens_and_its_end():
    speech, loaded = Speech("micro", "test", 1), worker_model("micro")
    clip, encoded = speech.clips[0], encode(loaded, speech, speech.clips)
    ids = loaded.decoder_input(clip.text)
    said = torch.tensor([[*ids, 50256]])
    with torch.no_grad():
        logs = loaded.module.decoder(said[:, :-1], encoded).log_softmax(-1)[0]
    expected = -sum(float(logs[place - 1, said[0, place]]) for place in range(2, said.shape[1]))
    loss, tokens = text_loss(loaded.module, encoded[0], clip.text, loaded.tokenizer())
    assert tokens == said.shape[1] - 2 and loss == pytest.approx(expected, rel=1e-4)
    other, _ = text_loss(loaded.module, encoded[0], "Nobody said anything of the kind.", loaded.tokenizer())
    assert other > 10 * loss
    assert transcribe_encoded(loaded.module, encoded)[0] == clip.text


def test_a_text_beyond_what_the_decoder_takes_is_cut(tmp_path):
    loaded = worker_model(str(write_tiny_whisper(tmp_path / "t.pt", n_text_ctx=8)))
    encoded = torch.zeros(1500, 32)
    assert text_loss(loaded.module, encoded, "one two three four five six seven eight nine ten", loaded.tokenizer())[1] == 7
    assert text_loss(loaded.module, encoded, "one two", loaded.tokenizer())[1] == 3


def test_random_features_match_those_that_they_stand_in_for():
    known = activity(Speech("micro", "test", 4), "micro", "auto", f"neurons:{SITE}.mlp.1", 0, "en", in_this_process)
    chosen = known.most_active(40)[20:]
    sets = known.matched(chosen, 2, seed=0)
    assert sets != known.matched(chosen, 2, seed=1)
    for one in sets:
        assert len(set(one)) == 20 and not set(one) & set(chosen)
        assert known.mean_abs[list(one)].mean() == pytest.approx(known.mean_abs[list(chosen)].mean(), rel=0.1)
    assert known.mean_abs.mean() < 0.75 * known.mean_abs[list(chosen)].mean()


def test_what_cannot_be_done_is_refused_before_there_is_work(refused, sae, tmp_path):
    def says(*arguments):
        return refused("experiment", *arguments, "--out", tmp_path / "r", "--no-ray")

    some = ("--features", f"neurons:{SITE}", "--feature", 1)
    assert "give one of --scale, --set, --add, --clamp" in says("steer", *some)
    assert "no more than one" in says("steer", *some, "--scale", 1, "--add", 1)
    assert "no feature 96" in says("steer", "--features", f"neurons:{SITE}", "--feature", 96, "--scale", 0)
    assert "is no stretch of time" in says("steer", *some, "--scale", 0, "--start", 2, "--end", 1)
    assert "after the end of every clip" in says("steer", *some, "--scale", 0, "--start", 29)
    assert "exclude each other" in says("steer", *some, "--scale", 0, "--start", 1, "--everywhere")
    assert "trained on model" in says("ablate", "--features", f"sae:{sae}", "--feature", 1, "--model", write_tiny_whisper(tmp_path / "t.pt"))
    assert "either --features or --site" in says("ablate")
    assert "too few for a random control" in says("ablate", "--features", f"neurons:{SITE}", "--limit", 1, "--feature", *range(60))
    assert "--each" in says("ablate", "--features", f"neurons:{SITE}")
    assert "no site matches" in says("ablate", "--site", "encoder.blocks.7")
    assert not (tmp_path / "r").exists()
