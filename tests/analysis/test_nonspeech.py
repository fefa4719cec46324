"""Sounds without speech follow from their seed, and are sounds."""

import numpy as np
import pytest
from conftest import micro_audio

from analysis.nonspeech import KINDS, LONGEST_S, MADE, SHORTEST_S, SPEECH_KINDS, make_sound
from cache.errors import HearsaeError


@pytest.fixture(scope="module")
def spoken():
    clips = micro_audio(3)
    return lambda number: clips[number % len(clips)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_follows_from_kind_number_and_seed_and_is_finite_and_within_full_scale(kind, spoken):
    for number in range(4):
        sound = make_sound(kind, number, 7, spoken)
        assert (sound.kind, sound.number, sound.audio.dtype, sound.audio.ndim) == (kind, number, np.float32, 1)
        assert np.isfinite(sound.audio).all() and np.abs(sound.audio).max() <= 1
        np.testing.assert_array_equal(make_sound(kind, number, 7, spoken).audio, sound.audio)
        assert (np.abs(sound.audio).max() > 0.005) == (kind != "silence")
        if kind in MADE:
            assert SHORTEST_S <= len(sound.audio) / 16000 <= LONGEST_S


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "silence"])
def test_other_numbers_and_seeds_are_other_sounds(kind, spoken):
    first, second, reseeded = make_sound(kind, 0, 7, spoken).audio, make_sound(kind, 1, 7, spoken).audio, make_sound(kind, 0, 8, spoken).audio
    assert len(first) != len(second) or (first != second).any()
    assert len(first) != len(reseeded) or (first != reseeded).any()


def power(audio, low, high):
    """Share of the power between two frequencies in Hz."""
    spectrum = np.abs(np.fft.rfft(audio)) ** 2
    frequency = np.fft.rfftfreq(len(audio), 1 / 16000)
    return spectrum[(frequency >= low) & (frequency < high)].sum() / spectrum.sum()


def test_noises_have_their_colours_and_hum_is_low():
    white, pink, brown, hum = (make_sound(kind, 0, 0).audio for kind in ("white", "pink", "brown", "hum"))
    assert power(white, 0, 4000) == pytest.approx(0.5, abs=0.05)  # half of the band, half of the power
    assert power(white, 0, 500) < power(pink, 0, 500) < power(brown, 0, 500)
    assert power(hum, 40, 500) > 0.99


def test_kinds_that_are_made_of_speech_keep_its_sound_and_not_its_order(spoken):
    said = spoken(1)
    assert set(SPEECH_KINDS) == {"reversed", "scrambled"}
    backwards = make_sound("reversed", 1, 0, spoken).audio
    assert np.corrcoef(backwards[::-1], said)[0, 1] > 0.98  # peaks of a loud one are clipped
    scrambled = make_sound("scrambled", 1, 0, spoken).audio
    assert len(scrambled) == len(said) and abs(np.corrcoef(scrambled, said)[0, 1]) < 0.2


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(HearsaeError, match=r"no kind 'rain'.*silence, white"):
        make_sound("rain", 0, 0)
