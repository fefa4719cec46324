"""Whole clips, words and phones of the static page in a real browser."""

import re
from pathlib import Path

import pytest
from test_explorer import CLICK_FRAME, CLICK_S, HOSTILE_NAME, HOSTILE_TEXT, make_world
from test_explorer_browser import Chromium, chromium, nothing_went_wrong  # noqa: F401
from test_explorer_clips import HOSTILE_PHONE, HOSTILE_WORD, PEAK_PHONE, make_said_world

from analysis.explorer.export import export

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_said_world(tmp_path_factory.mktemp("clips") / "world") / "page"


def number_of(chromium: Chromium, name: str) -> int:  # noqa: F811
    """The page's number of a source."""
    return chromium.run(f"return (await hearsae.load('clips')).source.indexOf({name!r})")


def labels(chromium: Chromium, where: str) -> list[str]:  # noqa: F811
    return chromium.run(f"return [...document.querySelectorAll({where!r})].map(box => box.title.replace(/, [0-9.]+ to [0-9.]+ s$/, ''))")


def test_card_shows_words_and_phones_on_the_pictures_time_axis(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan0/feature/0")
    chromium.wait("document.querySelector('.example .phones-tier')")
    card = "section.top .example:first-of-type"
    assert labels(chromium, f"{card} .words-tier .said") == ["plain", "words"]  # `late` is later than what is shown
    assert labels(chromium, f"{card} .phones-tier .said") == ["P", "L", PEAK_PHONE, "SIL"]
    assert chromium.run(f"return [...document.querySelectorAll('{card} .at-peak')].map(phone => phone.textContent)") == [PEAK_PHONE]
    places = chromium.run(f"""
        const picture = document.querySelector("{card} canvas").getBoundingClientRect();
        return [...document.querySelectorAll("{card} .said")].map(box => box.getBoundingClientRect())
          .map(box => [(box.left - picture.left) / picture.width, (box.right - picture.left) / picture.width])""")
    start, width = (CLICK_FRAME - 50) * 0.02, 101 * 0.02
    expected = [
        (max(0, from_ - start) / width, (to - start) / width)
        for from_, to in ((0.2, 1.0), (1.0, 1.5), (0.2, 0.6), (0.6, 1.25), (1.25, 1.35), (1.35, 1.5))
    ]
    assert [x for place in places for x in place] == pytest.approx([x for place in expected for x in place], abs=0.005)
    assert chromium.run(f"return document.querySelector('{card} .phones-tier').getAttribute('aria-label')") == "Phones: P L K SIL"


def test_page_without_timings_has_no_tiers(chromium: Chromium, tmp_path: Path) -> None:  # noqa: F811
    world = make_world(tmp_path / "world")
    export([world / "neurons"], tmp_path / "page")
    chromium.open(tmp_path / "page", "#scan0/feature/0")
    chromium.wait("document.querySelector('.example canvas').width !== 300")
    assert chromium.run("return document.querySelectorAll('.tier').length") == 0
    chromium.open(tmp_path / "page", "#scan0/clip/0")
    assert chromium.run("return [document.querySelectorAll('.tier').length, document.querySelectorAll('.clip-strip').length]") == [0, 12]


def test_card_leads_to_its_clip_and_a_strip_to_its_feature(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan0/feature/0")
    chromium.run("document.querySelector('.example .whole').click()")
    chromium.wait("document.querySelector('.clip')")
    assert chromium.run("return [location.hash, document.querySelector('h1').textContent]") == [f"#scan0/clip/0/{CLICK_FRAME}", "plain.wav"]
    assert chromium.run("return document.title").startswith("Clip 0 · Neurons of ")
    assert chromium.run("return document.querySelector('.clip-seek').getAttribute('aria-valuetext')") == "1.31 s"
    chromium.run("[...document.querySelectorAll('.clip-label a')].find(link => link.textContent === 'Neuron 0').click()")
    chromium.wait("document.querySelector('h1').textContent === 'Neuron 0'")


def test_clip_shows_all_its_words_and_the_click_where_it_is(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan0/clip/0")
    assert labels(chromium, ".words-tier .said") == ["plain", "words", "late"]
    chromium.wait("document.querySelector('.clip-picture').getContext('2d').getImageData(5, 5, 1, 1).data[3] > 0")
    at = chromium.run("""
        const row = [...document.querySelectorAll(".clip-row")].find(row => row.textContent.startsWith("Neuron 0"));
        const canvas = row.querySelector("canvas");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, 1).data;
        let strongest = 0;
        for (let x = 0; x < canvas.width; x++) if (pixels[4 * x + 3] > pixels[4 * strongest + 3]) strongest = x;
        return (strongest + 0.5) / canvas.width""")
    assert at * 3 == pytest.approx(CLICK_S, abs=0.03)


def test_click_seeks_space_plays_and_arrows_move(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan0/clip/0")
    shown = "document.querySelector('.clip-seek').getAttribute('aria-valuenow')"
    chromium.run("""
        const picture = document.querySelector(".clip-picture").getBoundingClientRect();
        const clientX = picture.left + picture.width / 3;
        document.querySelector(".clip-strip").dispatchEvent(new PointerEvent("pointerdown", {bubbles: true, clientX}))""")
    assert float(chromium.run(f"return {shown}")) == pytest.approx(1.0, abs=0.02)
    chromium.press(" ")
    chromium.wait("document.querySelector('.clip-play').textContent === 'Stop'")
    chromium.wait(f"{shown} > 1.1")
    chromium.press(" ")
    chromium.wait("document.querySelector('.clip-play').textContent === 'Play'")
    before = float(chromium.run(f"return {shown}"))
    chromium.run("document.querySelector('.clip-seek').focus()")
    chromium.press("\ue014")  # right
    assert float(chromium.run(f"return {shown}")) == pytest.approx(before + 0.1, abs=0.02)
    chromium.press("\ue010")  # end
    assert chromium.run(f"return {shown}") == "3.00"


def test_wide_clip_has_room_for_more_labels(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan0/clip/0")
    width = "return document.querySelector('.clip-picture').clientWidth"
    narrow = chromium.run(width)
    chromium.call("POST", "/window/rect", {"width": 700, "height": 900})
    try:
        chromium.run("document.querySelector('.clip input').click()")
        assert chromium.run(width) == 840 and narrow > 840
        assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
        chromium.run("document.querySelector('.clip input').click()")
        assert chromium.run(width) < 600
    finally:
        chromium.call("POST", "/window/rect", {"width": 1200, "height": 900})


def test_hostile_words_phones_and_names_stay_words(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page)
    chromium.open(page, f"#scan0/clip/{number_of(chromium, HOSTILE_NAME)}")
    assert labels(chromium, ".words-tier .said") == [HOSTILE_WORD] and labels(chromium, ".phones-tier .said") == [HOSTILE_PHONE]
    assert chromium.run("return document.querySelector('.phones-tier').getAttribute('aria-label')") == f"Phones: {HOSTILE_PHONE}"
    assert chromium.run("return [document.querySelector('h1').textContent, document.querySelector('.clip-words').textContent]") == [
        HOSTILE_NAME,
        HOSTILE_TEXT,
    ]
    chromium.open(page, "#scan0/feature/0")
    chromium.wait("document.querySelectorAll('.example .phones-tier').length > 1")
    assert HOSTILE_PHONE in chromium.run("return [...document.querySelectorAll('.at-peak')].map(phone => phone.textContent)")
    assert chromium.run("return document.querySelectorAll('main img, main script, main b[onclick]').length") == 0


def test_clip_without_sound_says_why_and_shows_its_features(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page)
    chromium.open(page, f"#scan0/clip/{number_of(chromium, 'gone.wav')}")
    assert chromium.run("return document.querySelector('.clip .note').textContent").startswith("No audio: ")
    assert chromium.run("return [document.querySelector('.clip-play').disabled, document.querySelectorAll('.clip-strip').length]") == [True, 12]


@pytest.mark.parametrize("place", ["#scan0/clip/99", "#scan2/clip/0"])
def test_clip_that_is_not_there_is_said(chromium: Chromium, page: Path, place: str) -> None:  # noqa: F811
    chromium.open(page, place)
    assert re.fullmatch(r"This page holds no clip \d+ of this scan\.", chromium.run("return document.querySelector('[role=alert]').textContent"))


def test_token_cards_have_no_clip_to_lead_to(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.open(page, "#scan2/feature/1")
    assert chromium.run("return [document.querySelectorAll('.example').length > 0, document.querySelectorAll('.whole, .tier').length]") == [True, 0]


def test_narrow_window_scrolls_the_tracks_alone_and_everything_has_a_name(chromium: Chromium, page: Path) -> None:  # noqa: F811
    chromium.call("POST", "/window/rect", {"width": 500, "height": 800})  # the narrowest that Chromium's window gets
    try:
        chromium.open(page, "#scan0/clip/0")
        assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
        named = "return [...document.querySelectorAll('button, a, [role]')].map(e => e.ariaLabel || e.textContent)"
        assert all(name.strip() for name in chromium.run(named))
    finally:
        chromium.call("POST", "/window/rect", {"width": 1200, "height": 900})
