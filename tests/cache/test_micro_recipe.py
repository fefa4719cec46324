"""How micro is made: texts, speech with its times, the cheap training forward against Whisper's own, a run that is cut off."""

import ctypes
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from cache.errors import HearsaeError
from cache.micro.recipe import espeak, forward, grammar, train
from cache.micro.recipe.batches import Batches, Vocabulary
from cache.micro.recipe.corpus import write_corpus
from cache.micro.recipe.forward import MIDDLE_BLOCK, POSITIONS, LogMel, Trainee
from cache.micro.recipe.publish import publish
from cache.micro.recipe.synthesis import PHONES, Clip, draw_clips, synthesise
from cache.micro.recipe.training_set import read_training_set, training_text, write_training_set
from cache.micro.recipe.voices import ACCENTS, HELD_OUT_VARIANTS, TRAINING_VARIANTS, Voice


def has_espeak() -> bool:
    try:
        ctypes.CDLL("libespeak-ng.so.1")
    except OSError:
        return False
    return True


needs_espeak = pytest.mark.skipif(not has_espeak(), reason="needs libespeak-ng (Debian: libespeak-ng1)")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in training: for matrices as small as these more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Texts


def test_a_few_hundred_words_written_as_whisper_writes() -> None:
    assert 300 <= len(grammar.vocabulary()) <= 500
    rng = random.Random(1)
    for _ in range(500):
        for text in (grammar.sentence(rng), grammar.word_string(rng)):
            assert text[0].isupper() and text[-1] in ".?"
            known = {word.lower() for word in grammar.vocabulary()}
            assert {word.strip(".,?").lower() for word in text.split()} <= known
        assert not re.search(r"\b[Aa] [aeiou]", grammar.sentence(rng))  # an angry fox


def test_training_never_says_what_is_held_out() -> None:
    rng = random.Random(2)
    held_out = {text for text in (grammar.sentence(rng) for _ in range(3000)) if grammar.is_held_out(text)}
    assert 200 < len(held_out) < 400
    said = {training_text(rng) for _ in range(3000)}
    assert not said & held_out
    assert grammar.is_held_out(grammar.BLOG_SENTENCE) and grammar.BLOG_SENTENCE not in said
    assert not set(TRAINING_VARIANTS) & set(HELD_OUT_VARIANTS)


# Speech


@needs_espeak
def test_words_and_phones_lie_where_they_are_said() -> None:
    clip = synthesise(grammar.BLOG_SENTENCE, Voice("en-us", "m6"), 160, 50, 50)
    assert clip is not None
    assert [word for word, _, _ in clip.words] == [word.strip(".") for word in grammar.BLOG_SENTENCE.split()]
    edges = [edge for _, start, end in clip.words for edge in (start, end)]
    assert edges == sorted(edges) and edges[-1] <= clip.seconds
    assert all(start < end for _, start, end in clip.phones)
    for (_, _, end), (_, start, _) in zip(clip.phones, clip.phones[1:], strict=False):
        assert end == pytest.approx(start, abs=1e-3)
    said = clip.samples.astype(float) / 32768
    pause = next((start, end) for phone, start, end in clip.phones if phone == "SIL" and end - start > 0.2)  # after "ones."
    middle = said[int((pause[0] + 0.06) * 16000) : int((pause[1] - 0.06) * 16000)]
    vowel = next((start, end) for phone, start, end in clip.phones if phone == "AA")
    assert np.abs(middle).max() < 0.02 < 0.1 < np.abs(said[int(vowel[0] * 16000) : int(vowel[1] * 16000)]).max()


@needs_espeak
@pytest.mark.parametrize(
    ("text", "first", "second"),
    [("There is a huge ring in the book.", "There", "is"), ("Yes, it is.", "it", "is"), ("Now of the toys.", "of", "the")],
)
def test_words_that_espeak_runs_together_are_parted(text: str, first: str, second: str) -> None:
    clip = synthesise(text, Voice("en-us", "m1"), 160, 50, 50)
    assert clip is not None
    at = [word for word, _, _ in clip.words].index(first)
    (_, start, middle), (word, begin, end) = clip.words[at : at + 2]
    assert word == second and start < middle <= begin < end


@needs_espeak
def test_every_phone_is_said_in_every_run_of_some_minutes() -> None:
    clips = draw_clips("phones", 250, training_text, TRAINING_VARIANTS, 8.0)
    said = {phone for clip in clips for phone, _, _ in clip.phones}
    assert said == set(PHONES)
    assert {clip.voice.variant for clip in clips} <= set(TRAINING_VARIANTS)


@needs_espeak
def test_every_voice_is_there() -> None:
    for voice in [*(Voice(accent, "m1") for accent in ACCENTS), *(Voice("en", variant) for variant in TRAINING_VARIANTS + HELD_OUT_VARIANTS)]:
        assert synthesise("Hello, John.", voice, 160, 50, 50) is not None, voice
    with pytest.raises(HearsaeError, match="no voice 'xx\\+m1'"):
        espeak.speak("Hello.", "xx+m1", 160, 50, 50)


@needs_espeak
def test_corpus_is_an_audio_folder_with_times_and_no_voice_in_two_splits(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": 12, "test": 4}, seed=3)
    rows = {split: [json.loads(line) for line in (tmp_path / split / "metadata.jsonl").read_text().splitlines()] for split in ("train", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 12, "test": 4}
    variants = {split: {row["speaker"].split("+")[1] for row in found} for split, found in rows.items()}
    assert not variants["train"] & variants["test"]
    assert all(grammar.is_held_out(row["text"]) for found in rows.values() for row in found)
    times = {row["file_name"]: row for row in map(json.loads, (tmp_path / "alignments.jsonl").read_text().splitlines())}
    for split, found in rows.items():
        for row in found:
            aligned = times[f"{split}/{row['file_name']}"]
            info = sf.info(tmp_path / split / row["file_name"])
            assert info.samplerate == 16000 and aligned["phones"][-1][1] <= info.duration + 0.01
            assert [word for _, _, word in aligned["words"]] == [word.strip(".,?") for word in row["text"].split()]


@needs_espeak
def test_the_same_corpus_twice(tmp_path: Path) -> None:
    """From a fresh process: within one, espeak-ng remembers what it said before."""
    for run in ("one", "other"):
        subprocess.run([sys.executable, "-m", "cache.micro.recipe", "held-out", "--out", str(tmp_path / run), "--clips", "9"], check=True, timeout=60)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 11
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


# The forward of training


def trainee(seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    dims = ModelDimensions(80, POSITIONS, 32, 2, 4, 51864, 64, 32, 2, 2)
    return Trainee(dims, used=50, phones=len(PHONES), words=7).eval()


def test_real_frames_with_a_few_weighted_paddings_stand_for_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all paddings the training forward is Whisper's own; with ten of them it is near."""
    model, frames = trainee(), 90
    audio = torch.zeros(480_000)
    audio[: 80 * 320] = 0.1 * torch.randn(80 * 320)
    mel = LogMel()(audio[None, : (2 * frames + 4) * 160], torch.ones(1), torch.zeros(1, 80))
    torch.testing.assert_close(mel, whisper.log_mel_spectrogram(audio)[None, :, : 2 * frames + 4], atol=1e-5, rtol=0)

    plain: Whisper = model.whisper
    plain.decoder.token_embedding = torch.nn.Embedding.from_pretrained(model.embedding.detach())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = plain.encoder(whisper.log_mel_spectrogram(audio)[None])
        expected = plain.decoder(tokens, whole).float()
        everything = model(mel, frames, torch.arange(frames, POSITIONS), tokens).tokens
        drawn = [torch.randint(frames, POSITIONS, (10,)) for _ in range(8)]
        some = torch.stack([model(mel, frames, paddings, tokens).tokens for paddings in drawn])
        monkeypatch.setattr(forward, "POSITIONS", frames + 10)  # as if there were no more
        unweighted = torch.stack([model(mel, frames, paddings, tokens).tokens for paddings in drawn])
    assert (everything - expected).abs().max() < 0.05 * expected.std()  # bfloat16
    assert (some.mean(0) - expected).abs().mean() < 0.5 * (unweighted.mean(0) - expected).abs().mean()


def test_the_decoder_sees_silence_where_a_word_is_chopped() -> None:
    model, frames, paddings, tokens = trainee(), 30, torch.arange(40, 50), torch.tensor([[1, 2], [3, 4]])
    mel = torch.randn(2, 80, 2 * frames + 4)
    nowhere, everywhere = torch.zeros(2, frames, dtype=torch.bool), torch.ones(2, frames, dtype=torch.bool)
    one_row = torch.tensor([[True], [False]]) & everywhere
    with torch.no_grad():
        plain, same = model(mel, frames, paddings, tokens), model(mel, frames, paddings, tokens, nowhere)
        chopped = model(mel, frames, paddings, tokens, one_row)
        silence = model(torch.full_like(mel, whisper.log_mel_spectrogram(torch.zeros(16_000)).max()), frames, paddings, tokens)
        encoded, _, _ = model._encode(mel, frames, paddings)
        alone = model._chop(encoded, mel, frames, paddings, everywhere)
    assert torch.equal(plain.tokens, same.tokens)
    assert torch.equal(chopped.tokens[1], plain.tokens[1]) and not torch.equal(chopped.tokens[0], plain.tokens[0])
    assert torch.equal(chopped.words, plain.words)  # what the frames say of themselves stays
    # All real frames silent, the paddings as they were: near what silence gives, and the same whatever was said.
    assert torch.equal(alone[0, :frames], alone[1, :frames])
    assert (chopped.tokens[0] - silence.tokens[0]).abs().mean() < (plain.tokens[0] - silence.tokens[0]).abs().mean()


def test_unused_tokens_keep_their_logit_whatever_is_said(tmp_path: Path) -> None:
    model = Trainee(train.DIMS, used=5, phones=3, words=3)
    used = [11, 50256, 50257, 50362, 400]
    torch.save({"model": model.state_dict(), "used": used, "step": 0, "optimizers": []}, tmp_path / "trainee.pt")
    publish(tmp_path / "trainee.pt", tmp_path / "micro.pt")
    publish(tmp_path / "trainee.pt", tmp_path / "again.pt")
    assert (tmp_path / "micro.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()
    stock = whisper.load_model(str(tmp_path / "micro.pt"), device="cpu")
    with torch.no_grad():
        logits = stock.decoder(torch.tensor([[50257, 50362, 400]]), torch.randn(1, 1500, 96))
    unused = torch.ones(51864, dtype=torch.bool)
    unused[used] = False
    torch.testing.assert_close(logits[..., unused], torch.full_like(logits[..., unused], -30.0), atol=0.02, rtol=0)
    assert (logits[..., used] > -30).all()


def test_middle_phones_are_asked_after_the_block_that_everything_else_looks_at() -> None:
    assert MIDDLE_BLOCK == 2
    model, seen = trainee(), []
    mel = torch.randn(1, 80, 2 * 20 + 4)
    model.middle_phones.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.whisper.encoder.blocks[3].attn_ln.weight.data += 1  # what comes after the middle does not matter to it
    with torch.no_grad():
        model(mel, 20, torch.tensor([100, 200]), torch.tensor([[1, 2]]))
        model.whisper.encoder.blocks[3].mlp[0].weight.data *= 2
        model(mel, 20, torch.tensor([100, 200]), torch.tensor([[1, 2]]))
        model.whisper.encoder.blocks[2].mlp[0].weight.data *= 2
        model(mel, 20, torch.tensor([100, 200]), torch.tensor([[1, 2]]))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# Training


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_espeak():
        pytest.skip("needs libespeak-ng (Debian: libespeak-ng1)")
    folder = tmp_path_factory.mktemp("speech")
    clips = [clip for clip in (draw(seed) for seed in range(60)) if clip]
    (folder / "0000.pcm").write_bytes(np.concatenate([clip.samples for clip in clips]).tobytes())
    first, lines = 0, []
    for clip in clips:
        lines.append(json.dumps({"text": clip.text, "words": clip.words, "phones": clip.phones, "first": first, "count": len(clip.samples)}))
        first += len(clip.samples)
    (folder / "0000.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def draw(seed: int) -> Clip | None:
    rng = random.Random(seed)
    return synthesise(training_text(rng), Voice("en-us", "m1"), 180, 50, 50)


def test_every_text_has_its_tokens() -> None:
    vocabulary, rng = Vocabulary(), random.Random(4)
    texts = [write(rng) for _ in range(2000) for write in (grammar.sentence, grammar.word_string)]
    assert {token for text in texts for token in vocabulary.tokenizer.encode(" " + text)} <= vocabulary.place.keys()


def test_targets_say_what_is_heard(small_set: Path) -> None:
    clips = read_training_set(small_set)
    batches = Batches(clips, Vocabulary(), size=2, steps=100, seed=0)
    batch = batches(30)
    same = Batches(clips, Vocabulary(), size=2, steps=100, seed=0)(30)
    assert all(torch.equal(getattr(batch, name), getattr(same, name)) for name in ("samples", "phones", "words", "tokens", "targets", "spans"))
    assert batch.samples.shape == (2, (2 * batch.frames + 4) * 160)
    halves = [batches(30, rank, 2) for rank in (0, 1)]
    assert sorted(len(half.samples) for half in halves) == [1, 1]
    for step in range(12):
        batch = batches(step)
        silent = (batch.phones == 0) & (batch.words > 0)
        assert not silent.any()  # a word is never asked for where nothing is said
        assert (batch.spans.any(-1) <= (batch.targets != -100)).all()


def test_to_write_a_word_is_to_look_at_it(small_set: Path) -> None:
    """The position that predicts a token is the one that must attend to the token's word: so stock Whisper reads its alignment."""
    vocabulary, clips = Vocabulary(), read_training_set(small_set)
    batches = Batches(clips, vocabulary, size=2, steps=100, seed=0)
    words, checked = {index: word for word, index in batches.word_index.items()}, 0
    for step in range(24):
        batch = batches(step)
        for row, position in torch.nonzero(batch.spans.any(-1)).tolist():
            token = vocabulary.tokenizer.decode([vocabulary.used[int(batch.targets[row, position])]]).strip().lower()
            looked_at = batch.words[row][batch.spans[row, position]]
            if (looked_at > 0).sum() >= 4:  # of a syllable, the edges may be of its neighbours
                assert any(token in words[index] for index in looked_at.tolist() if index > 0)  # the word, or a piece of it
                checked += 1
    assert checked > 50


def test_a_silenced_word_is_neither_heard_nor_asked_for(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cache.micro.recipe.batches as module

    vocabulary, clips = Vocabulary(), read_training_set(small_set)
    monkeypatch.setattr(module, "EMPTY", 0.0)
    monkeypatch.setattr(module, "TEXT_ON_PADDING", 0.0)
    several = [index for index, clip in enumerate(clips) if len(clip.words) > 2]

    def words_asked(share: float) -> list[int]:
        monkeypatch.setattr(module, "LOST_WORD", share)
        batches = Batches([clips[index] for index in several], vocabulary, 1, 100, 0)
        return [len(set(item.words[item.words > 0].tolist())) for item in (batches._item(clip, random.Random(1), 0) for clip in batches.clips)]

    assert all(less <= all_ for less, all_ in zip(words_asked(1.0), words_asked(0.0), strict=True))
    assert sum(words_asked(0.0)) - sum(words_asked(1.0)) > 0.8 * len(several)


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = train.Recipe(steps=4, batch=2, warmup=2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    plain_call = Batches.__call__

    def cut_off(batches: Batches, step: int, rank: int = 0, world: int = 1) -> object:
        if step == 3:
            raise KeyboardInterrupt
        return plain_call(batches, step, rank, world)

    def run(out: Path) -> dict[str, torch.Tensor]:
        out.mkdir(exist_ok=True)
        train._run(0, 1, small_set, out, recipe, torch.device("cpu"))
        return torch.load(out / "trainee.pt", weights_only=True)["model"]

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__call__", cut_off)
        run(tmp_path / "cut")
    continued = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_late_in_a_run_words_are_lost_between_encoder_and_decoder(small_set: Path) -> None:
    vocabulary, clips = Vocabulary(), read_training_set(small_set)
    batches = Batches(clips, vocabulary, size=2, steps=200, seed=0)
    early = [batches(step) for step in range(40)]
    late = [batches(step) for step in range(100, 140)]
    assert not any(batch.chopped.any() for batch in early)
    found = 0
    for batch in late:
        for row in torch.nonzero(batch.chopped.any(-1)).flatten():
            found += 1
            said, where = batch.words[row] > 0, batch.chopped[row]
            assert said[where].any()  # heard
            asked = batch.spans[row].any(-2) & said
            word = batch.words[row][where].mode().values
            inner = where & (batch.words[row] == word)
            if inner.sum() >= 6:
                assert (asked & inner).sum() <= 3  # and not asked for: its edges may be a neighbour's too
    assert found > 5


def test_the_state_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    torch.save({"recipe": asdict(train.Recipe(steps=9)), "step": 9}, tmp_path / "trainee.pt")
    with pytest.raises(HearsaeError, match=r"another recipe.*choose another --work"):
        train.train(tmp_path, tmp_path, train.Recipe(steps=7), 1, "cpu")


@pytest.mark.slow
def test_two_processes_train_as_one(small_set: Path, tmp_path: Path) -> None:
    """Every rank has its own share of the batch; what they learn, all of them have."""
    recipe = train.Recipe(steps=2, batch=2, warmup=1)
    (tmp_path / "rendezvous").write_text("of a run that was cut off")
    together = torch.load(train.train(small_set, tmp_path, recipe, 2, "cpu"), weights_only=True)
    (tmp_path / "alone").mkdir()
    train._run(0, 1, small_set, tmp_path / "alone", recipe, torch.device("cpu"))
    alone = torch.load(tmp_path / "alone" / "trainee.pt", weights_only=True)
    assert together["step"] == alone["step"] == 2
    matrices = {name: (tensor, alone["model"][name]) for name, tensor in together["model"].items() if tensor.ndim > 1}
    # Each rank takes means over its own share, so the same only nearly.
    assert max(float((one - other).norm() / other.norm()) for one, other in matrices.values()) < 0.15


@needs_espeak
def test_parts_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "0000.jsonl").write_text("")
    (tmp_path / "0000.pcm").write_bytes(b"\0\0")
    write_training_set(tmp_path, 400, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.jsonl", "0000.pcm"]
