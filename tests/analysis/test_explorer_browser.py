"""The static page in a real browser: headless Chromium, from the file system."""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_explorer import CLICK_FRAME, CLICK_S, HOSTILE_NAME, HOSTILE_TEXT, SITE, WIDTH, make_world

from analysis.explorer.export import export

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required --window-size=1200,900"
)
READY_S = 20


class Chromium:
    """Chromium through its WebDriver: https://www.w3.org/TR/webdriver2/, plain JSON over HTTP."""

    def __init__(self, chromium: str, driver: str, profile: Path, flags: str = FLAGS) -> None:
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout
        port = next(found[1] for line in self.process.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": chromium, "args": [*flags.split(), f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "timeouts": {"script": 1000 * READY_S},
        }
        self.address += "/session/" + self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path, place: str = "") -> None:
        """Opens the page anew and waits until it shows what `place` asks for."""
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": f"{(page / 'index.html').as_uri()}{place}"})
        self.wait(f"document.documentElement.dataset.shown === {json.dumps(place)}")

    def run(self, script: str) -> Any:
        """The value of the body of an async function."""
        wrapped = f"const done = arguments[0]; (async () => {{ {script} }})().then(value => done({{value}}), error => done({{error: String(error)}}))"
        result = self.call("POST", "/execute/async", {"script": wrapped, "args": []})
        assert "error" not in result, result["error"]
        return result["value"]

    def wait(self, condition: str) -> None:
        self.run(f"while (!({condition})) await new Promise(next => setTimeout(next, 20))")

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        """What the console says since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.call("POST", "/se/log", {"type": "performance"})]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("browser") / "world")
    export([world / "neurons", world / "latents", world / "tokens"], world / "page")
    return world / "page"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    started = Chromium(browser, driver, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def nothing_went_wrong(chromium: Chromium) -> Iterator[None]:
    """In every test: nothing but local files was asked for, the console is empty, and no script from the data ran."""
    chromium.complaints(), chromium.requests()
    yield
    assert "owned" not in chromium.run("return document.title")
    assert chromium.complaints() == []
    assert [address for address in chromium.requests() if not address.startswith(("file:", "data:", "about:"))] == []


def column(chromium: Chromium, which: str) -> list[str]:
    return chromium.run(f"return [...document.querySelectorAll('.list tbody tr:not([aria-hidden]) > {which}')].map(cell => cell.textContent)")


def headings(chromium: Chromium) -> list[str]:
    return chromium.run("return [...document.querySelectorAll('h1, h2, h3')].map(heading => heading.textContent)")


# The list


def test_list_shows_every_scan(chromium: Chromium, page: Path) -> None:
    chromium.open(page)
    assert headings(chromium) == [f"Neurons of {SITE}"]
    assert chromium.run("return [...document.querySelectorAll('#scans a')].map(link => link.textContent)") == [
        f"Neurons of {SITE} {WIDTH}",
        f"Latents of sae, {SITE} 64",
        f"Neurons of decoder.blocks.0.mlp.1 {WIDTH}",
    ]
    assert column(chromium, "th")[:3] == ["0", "1", "2"]
    assert column(chromium, "td.max")[0] == "5.00"
    assert chromium.run("return document.querySelector('.list thead th').scope") == "col"
    chromium.run("document.querySelectorAll('#scans a')[1].click()")
    chromium.wait("document.querySelector('h1').textContent.startsWith('Latents')")
    assert chromium.run("return document.querySelector('#scans [aria-current]').textContent") == f"Latents of sae, {SITE} 64"


def test_list_sorts_and_searches(chromium: Chromium, page: Path) -> None:
    features = pq.read_table(page.parent / "neurons" / "features.parquet").to_pandas()
    chromium.open(page)
    chromium.run("document.querySelector('th.max button').click()")
    assert list(map(int, column(chromium, "th")))[:10] == features.sort_values("max", ascending=False)["feature"].tolist()[:10]
    assert chromium.run("return document.querySelector('th.max').getAttribute('aria-sort')") == "descending"
    chromium.run("document.querySelector('th.max button').click()")
    assert column(chromium, "th")[0] == str(WIDTH - 1)

    search = "const box = document.querySelector('input[type=search]'); box.value = {}; box.dispatchEvent(new Event('input'))"
    chromium.run(search.format("'3'"))
    assert set(column(chromium, "th")) == {"3", *map(str, range(30, 40))}
    chromium.run(search.format("'PLAIN WORDS'"))
    assert column(chromium, "td.words") and set(column(chromium, "td.words")) == {"plain words"}
    chromium.run(search.format("'no such words'"))
    assert column(chromium, "th") == []


def test_list_of_many_features_keeps_few_rows_in_the_document(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    large = tmp_path / "page"
    shutil.copytree(page, large)
    n = 12_288
    rows = {
        "feature": list(range(n)),
        "spark": ["0z1"] * n,
        "text": [0] * n,
        "texts": ["some words"],
        "density": [0.1] * n,
        "max": list(range(n)),
        "mean_active": [1] * n,
    }
    (large / "data" / "scan0" / "list.js").write_text(f'hearsae.register("scan0/list",{json.dumps(rows)});')
    chromium.open(large)
    assert 20 < len(column(chromium, "th")) < 120
    chromium.run("window.scrollTo(0, document.body.scrollHeight)")
    chromium.wait(f"[...document.querySelectorAll('.list tbody th')].at(-1).textContent === '{n - 1}'")
    assert len(column(chromium, "th")) < 120


# A feature


def test_feature_shows_its_examples_by_kind_and_bin(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    shown = headings(chromium)
    assert shown[0] == "Neuron 0"
    assert [text for text in shown if text.split()[0] in ("Strongest", "Ranges", "Quantiles")] == [
        "Strongest at most one a clip",
        "Ranges of equal width, from high to low",
        "Quantiles of the active rows, from high to low",
    ]
    examples = pq.read_table(page.parent / "neurons" / "examples.parquet").to_pandas().query("feature == 0")
    assert chromium.run("return document.querySelectorAll('.example').length") == len(examples)
    assert chromium.run("return document.querySelectorAll('section.top .example').length") == 3
    values = chromium.run("return [...document.querySelectorAll('section.top .facts b')].map(value => value.textContent)")
    assert values == ["5.00", "4.90", "4.80"]
    ranges = [text for text in shown if re.fullmatch(r"\S+ to \S+", text)]
    assert ranges[0] == "3.75 to 5.00" and ranges == sorted(ranges, reverse=True)


def test_hostile_words_and_names_stay_words(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    words = chromium.run("return [...document.querySelectorAll('.words')].map(words => words.textContent)")
    names = chromium.run("return [...document.querySelectorAll('.source')].map(name => name.textContent)")
    assert HOSTILE_TEXT in words and HOSTILE_NAME in names
    assert chromium.run("return document.querySelectorAll('main img, main script, main b[onclick]').length") == 0
    chromium.open(page)
    assert HOSTILE_TEXT in column(chromium, "td.words")
    assert chromium.run("return document.querySelectorAll('main img, main script').length") == 0


def test_audio_decodes_with_its_time_axis_in_place(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    found = chromium.run("""
        const audio = await hearsae.clipAudio((await hearsae.load("clips")).source.indexOf("plain.wav"));
        const samples = audio.getChannelData(0);
        let loudest = 0;
        samples.forEach((sample, i) => { if (Math.abs(sample) > Math.abs(samples[loudest])) loudest = i; });
        return {rate: audio.sampleRate, length: samples.length, at: loudest / audio.sampleRate}""")
    assert (found["rate"], found["length"]) == (16000, 48000)
    assert found["at"] == pytest.approx(CLICK_S, abs=1e-4)


def test_picture_shows_click_and_trace_at_the_peak(chromium: Chromium, page: Path) -> None:
    """The loudest column of the spectrogram and the top of the trace lie in the picture's middle, the peak's frame."""
    chromium.open(page, "#scan0/feature/0")
    found = chromium.run("""
        const audio = await hearsae.clipAudio((await hearsae.load("clips")).source.indexOf("plain.wav"));
        const start = (65 - 50) * 0.02, levels = hearsae.melSpectrogram(audio.getChannelData(0), 16000, start, 2.02);
        const loudness = levels.map(level => level.reduce((a, b) => a + b, 0));
        return {columns: levels.length, bands: levels[0].length, loudest: loudness.indexOf(Math.max(...loudness))}""")
    assert (found["columns"], found["bands"]) == (404, 80)
    middle_of_click = CLICK_S - (CLICK_FRAME - 50) * 0.02
    assert (found["loudest"] + 0.5) * 0.005 == pytest.approx(middle_of_click, abs=0.01)

    chromium.wait("document.querySelector('.example canvas').width !== 300")  # 300 is a canvas's width before it is drawn
    top_of_trace = chromium.run("""
        const canvas = document.querySelector(".example canvas"), {width, height} = canvas;
        const top = Math.round(height * 0.62) + 4, pixels = canvas.getContext("2d").getImageData(0, top, width, height - top).data;
        const highest = [];
        for (let x = 0; x < width; x++) {
          let y = 0;
          while (y < height - top && pixels[4 * (y * width + x) + 3] < 60) y++;
          highest.push(y);
        }
        return {at: highest.indexOf(Math.min(...highest)) / width, drawn: highest.filter(y => y < height - top).length / width}""")
    assert top_of_trace["at"] == pytest.approx(0.5, abs=0.02)
    assert top_of_trace["drawn"] > 0.9


def test_sound_away_from_the_peak_is_quieter_unless_asked_otherwise(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    gains = chromium.run("""
        const played = async (lift) => {
          const context = new OfflineAudioContext(1, 32000, 16000), ones = context.createBuffer(1, 48000, 16000);
          ones.getChannelData(0).fill(1);
          hearsae.schedule(context, ones, {start: 0.3, end: 2.3, peak: 1.3}, lift, 0);
          return Array.from((await context.startRendering()).getChannelData(0));
        };
        return [await played(true), await played(false)]""")
    lifted, plain = (np.array(gain) for gain in gains)
    at = np.arange(32000) / 16000
    assert lifted[np.abs(at - 1) <= 0.145] == pytest.approx(1, abs=0.01)
    away = (np.abs(at - 1) >= 0.31) & (at > 0.02) & (at < 1.98)
    assert lifted[away] == pytest.approx(0.25, abs=0.01)
    assert np.abs(np.diff(lifted)).max() < 0.01
    assert plain[(at > 0.02) & (at < 1.98)] == pytest.approx(1, abs=1e-3)


def test_space_plays_and_j_and_k_walk_the_list(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0")
    chromium.run("document.querySelector('th.max button').click(); location.hash = '#scan0/feature/0'")
    chromium.wait("document.querySelector('h1').textContent === 'Neuron 0'")
    order = pq.read_table(page.parent / "neurons" / "features.parquet").to_pandas().sort_values("max", ascending=False)["feature"].tolist()
    at = order.index(0)
    chromium.press("j")
    chromium.wait(f"document.querySelector('h1').textContent === 'Neuron {order[at + 1]}'")
    chromium.press("k")
    chromium.wait("document.querySelector('h1').textContent === 'Neuron 0'")
    chromium.press(" ")
    chromium.wait("document.querySelector('.example').matches('.playing.selected')")
    chromium.wait("parseFloat(document.querySelector('.cursor').style.left) > 5")
    chromium.press(" ")
    chromium.wait("!document.querySelector('.playing')")


def test_clip_without_sound_says_why_and_the_rest_works(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    notes = chromium.run("return [...document.querySelectorAll('.note:not([hidden])')].map(note => note.textContent)")
    assert notes and all(note.startswith("No audio: ") for note in notes)
    assert chromium.run("return document.querySelector('.note:not([hidden])').closest('.example').querySelector('button')") is None


def test_token_scan_shows_tokens_and_no_sound(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan2/feature/1")
    assert chromium.run("return document.querySelectorAll('.example').length") > 0
    assert chromium.run("return document.querySelectorAll('.example button').length") == 0
    facts = chromium.run("return [...document.querySelectorAll('.facts span:first-of-type')].map(fact => fact.textContent)")
    assert all(re.fullmatch(r"token \d+", fact) for fact in facts)


def test_feature_that_was_never_active_says_so(chromium: Chromium, page: Path) -> None:
    chromium.open(page, f"#scan0/feature/{WIDTH - 1}")
    assert "never active" in chromium.run("return document.querySelector('main').textContent")


def test_buttons_have_names(chromium: Chromium, page: Path) -> None:
    for place in ("", "#scan0/feature/0"):
        chromium.open(page, place)
        names = chromium.run(
            "return [...document.querySelectorAll('button, a, input')].map(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)"
        )
        assert all(name and name.strip() for name in names)
    assert "Play example: value 5.00, 1.30 s" in " ".join(names)


def test_what_is_not_there_is_said(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    chromium.open(page, "#scan0/feature/999")
    assert chromium.run("return document.querySelector('[role=alert]').textContent") == "This page holds no neuron 999."
    shutil.copytree(page, tmp_path / "page")
    (tmp_path / "page" / "data" / "scan0" / "block0.js").unlink()
    chromium.open(tmp_path / "page", "#scan0/feature/0")
    assert "data/scan0/block0.js can't be loaded" in chromium.run("return document.querySelector('[role=alert]').textContent")
    assert len(chromium.complaints()) == 1  # the browser's own word about the missing file


def test_screenshot_is_not_blank(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    assert len(base64.b64decode(chromium.call("GET", "/screenshot"))) > 20_000
