"""The live page in a real browser: headless Chromium, a real server on loopback, real micro."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile
from test_explorer_browser import FLAGS, Chromium
from test_explorer_live import SCANS, make_live_world
from test_explorer_live_server import running

from analysis.explorer.export import export
from analysis.explorer.live import Live
from analysis.explorer.live_api import STRIPS, LiveApi
from analysis.explorer.server import LiveServer
from cache import micro
from cache.timings import read_timings
from cluster.commands.align import Align

pytestmark = pytest.mark.browser

CLIP = sorted((micro.SPEECH / "test").glob("*.flac"))[0]
HEARD = "document.documentElement.dataset.heard && document.querySelectorAll('.live-strips li').length"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    world = make_live_world(tmp_path_factory.mktemp("live-browser"))
    scans = [world / name for name in SCANS]
    export(scans, world / "page", audio="none")
    Align(store=world / "acts.zarr", import_=("micro",)).run()
    with running(world / "page", LiveApi(Live.open(scans))) as started:
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Whose microphone hears a clip of micro's speech, over and over."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    folder = tmp_path_factory.mktemp("profile")
    samples, rate = soundfile.read(CLIP)
    soundfile.write(folder / "microphone.wav", samples, rate, subtype="PCM_16")
    microphone = f"--use-fake-device-for-media-stream --use-fake-ui-for-media-stream --use-file-for-fake-audio-capture={folder / 'microphone.wav'}"
    started = Chromium(browser, driver, folder / "profile", f"{FLAGS} {microphone}")
    yield started
    started.close()


@pytest.fixture(autouse=True)
def nothing_went_wrong(chromium: Chromium, server: LiveServer) -> Iterator[None]:
    """In every test: nothing but this server was asked, and the console is empty."""
    chromium.complaints(), chromium.requests()
    chromium.call("POST", "/url", {"url": "about:blank"})
    chromium.call("POST", "/url", {"url": server.address})
    chromium.wait("document.documentElement.dataset.shown === 'live'")
    yield
    assert chromium.complaints() == []
    ours = server.address.removesuffix("live")
    assert [address for address in chromium.requests() if not address.startswith((ours, "data:", "about:", f"blob:{ours}"))] == []


def upload(chromium: Chromium, file: Path) -> None:
    element = chromium.call("POST", "/element", {"using": "css selector", "value": "input[type=file]"})
    chromium.call("POST", f"/element/{next(iter(element.values()))}/value", {"text": str(file)})


def choose(chromium: Chromium, which: str, value: str) -> None:
    chromium.run(f"const s = document.querySelector('#scan-{which}'); s.value = '{value}'; s.dispatchEvent(new Event('change'))")


def texts(chromium: Chromium, selector: str) -> list[str]:
    return chromium.run(f"return [...document.querySelectorAll({selector!r})].map(node => node.textContent)")


def click_at(chromium: Chromium, selector: str, share: float) -> None:
    """With the mouse, at a share of the element's width."""
    chromium.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    element = chromium.call("POST", "/element", {"using": "css selector", "value": selector})
    width = chromium.run(f"return document.querySelector({selector!r}).getBoundingClientRect().width")
    move = {"type": "pointerMove", "origin": element, "x": round((share - 0.5) * width), "y": 0, "duration": 0}
    actions = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
    chromium.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})


def picture(chromium: Chromium, selector: str) -> np.ndarray:
    """uint8 [height, width, 4] of a canvas."""
    height, width, data = chromium.run(f"""
        const canvas = document.querySelector({selector!r}), {{width, height}} = canvas;
        const bytes = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        let text = "";
        for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
        return [height, width, btoa(text)]""")
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def test_an_upload_shows_its_features_and_its_words(chromium: Chromium, server: LiveServer) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    api = server.api
    audio, sound = list(api._sounds.items())[-1]
    rows = api.strips({"audio": audio, "scan": "scan0"})["rows"]
    assert texts(chromium, ".live-strips li a") == [f"Neuron {feature}" for feature in rows["feature"]]
    assert texts(chromium, ".live-words span") == [sound.text]
    assert chromium.run("return document.querySelector('.live-strips a').getAttribute('href')") == f"./#scan0/feature/{rows['feature'][0]}"
    assert f"{len(sound.samples) / 16000:.2f} s" in texts(chromium, ".live-status")[0]
    # The strip is strongest where the feature is.
    strength = picture(chromium, ".live-strip canvas")[5, :, 3].astype(int)
    at = np.flatnonzero(strength == strength.max()).mean() / len(strength)
    assert at == pytest.approx((rows["frame"][0] + 0.5) / sound.n_frames, abs=0.03)


def test_a_click_shows_the_curve_and_the_moment(chromium: Chromium, server: LiveServer) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    shown = "return document.querySelector('.live-picture').toDataURL()"
    before = chromium.run(shown)
    click_at(chromium, ".live-strip", 0.4)
    chromium.wait("document.querySelector('.live-moment table')")
    assert chromium.run(shown) != before and texts(chromium, ".live-strip[aria-pressed=true]") == [""]
    audio, sound = list(server.api._sounds.items())[-1]
    frame = int(float(chromium.run("return document.querySelector('.live-seek').ariaValueNow")) / 0.02 + 0.5)
    assert frame == pytest.approx(0.4 * sound.n_frames, abs=2)
    expected = server.api.moment({"audio": audio, "scan": "scan0", "frame": str(frame)})["rows"]["feature"]
    assert texts(chromium, ".live-moment tbody th") == [f"Neuron {feature}" for feature in expected]
    # By keys too.
    chromium.run("document.querySelector('.live-seek').focus()")
    chromium.press("\ue014")  # right
    chromium.wait(f"document.querySelector('.live-moment h3').textContent === 'At {(frame + 1) * 0.02:.2f} s'")


def test_a_feature_is_pinned_by_its_number_and_stays_for_the_next_sound(chromium: Chromium) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    pin = "const box = document.querySelector('.live-pin input'); box.value = {}; box.form.requestSubmit()"
    chromium.run(pin.format("'17'"))
    chromium.wait("document.querySelector('.live-strips li.pinned')")
    assert texts(chromium, ".live-strips li a")[0] == "Neuron 17"
    chromium.run(pin.format("'9999'"))
    chromium.wait("!document.querySelector('.live-panel .problem').hidden")
    assert "There is no neuron '9999'" in texts(chromium, ".live-panel .problem")[0]
    upload(chromium, CLIP.with_name(sorted((micro.SPEECH / "test").glob("*.flac"))[1].name))
    chromium.wait("document.documentElement.dataset.heard === '2' && document.querySelector('.live-strips li.pinned')")
    chromium.run("document.querySelector('.live-unpin').click()")
    chromium.wait(f"!document.querySelector('.live-strips li.pinned') && document.querySelectorAll('.live-strips li').length === {STRIPS}")


def test_the_switch_changes_what_strong_means(chromium: Chromium) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    assert texts(chromium, ".live-value")[0].endswith("σ")
    chromium.run("document.querySelector('input[value=share]').click()")
    chromium.wait("document.querySelector('.live-value').textContent.endsWith('%')")
    shares = [float(text.split()[0]) for text in texts(chromium, ".live-value")]
    assert shares == sorted(shares, reverse=True)


def test_two_saes_side_by_side_with_their_matches(chromium: Chromium, server: LiveServer) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    choose(chromium, "A", "1")
    choose(chromium, "B", "2")
    chromium.wait("document.querySelector('.live-matches table')")
    assert [heading.split(" of ")[0] for heading in texts(chromium, ".live-panel h2")] == ["Latents", "Latents"]
    assert all("reconstruction error (FVU) on this sound" in fact for fact in texts(chromium, ".live-panel .about"))
    left, right = chromium.run("return [...document.querySelectorAll('.live-panel')].map(panel => panel.getBoundingClientRect().left)")
    assert right > left + 300
    audio = next(reversed(server.api._sounds))
    found = server.api.compare({"audio": audio, "a": "scan1", "b": "scan2"})["matches"]
    assert texts(chromium, ".live-matches tbody th") == [f"Latent {feature}" for feature in found["feature"]]
    assert texts(chromium, ".live-matches tbody td:nth-child(2)") == [f"Latent {feature}" for feature in found["other"]]
    assert "1.00" in texts(chromium, ".live-matches tbody td:nth-child(3)")
    choose(chromium, "B", "0")
    chromium.wait("document.querySelector('.live-matches p')?.textContent.startsWith('Only latents')")


def test_space_plays_and_the_cursor_moves(chromium: Chromium) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    chromium.run("document.activeElement.blur()")
    chromium.press(" ")
    chromium.wait("parseFloat(document.querySelector('.live-cursor').style.getPropertyValue('--at')) > 0.02")
    assert texts(chromium, ".live-play") == ["Pause"]
    chromium.press(" ")
    chromium.wait("document.querySelector('.live-play').textContent === 'Play'")


def test_what_the_microphone_hears_is_heard(chromium: Chromium, server: LiveServer) -> None:
    chromium.run("document.querySelector('.live-record').click()")
    chromium.wait("document.querySelector('.live-record').textContent === 'Stop recording'")
    chromium.run("await new Promise(next => setTimeout(next, 1500)); document.querySelector('.live-record').click()")
    chromium.wait(HEARD)
    sound = next(reversed(server.api._sounds.values()))
    assert 1 < len(sound.samples) / 16000 < 6
    assert np.abs(sound.samples).max() > 0.02  # speech, not silence
    assert texts(chromium, ".live-record") == ["Record"]


def test_a_clip_of_the_store_is_found_and_heard_with_its_text(chromium: Chromium, server: LiveServer) -> None:
    text = server.api._stores[0].clips["text"][1].as_py()
    chromium.run(f"const box = document.querySelector('.live-search input'); box.value = {text!r}; box.dispatchEvent(new Event('input'))")
    chromium.wait("document.querySelector('.live-clips button')")
    assert text in texts(chromium, ".live-clips button")[0]
    chromium.run("document.querySelector('.live-clips button').click()")
    chromium.wait(HEARD)
    assert texts(chromium, ".live-words span")[0] == text
    known = read_timings(server.api._stores[0])
    for tier, table in (("words", known.words), ("phones", known.phones)):
        said = table.filter(pc.equal(table["clip"], 1))
        shown = chromium.run(f"""
            const picture = document.querySelector(".live-picture").getBoundingClientRect();
            return [...document.querySelectorAll(".{tier}-tier .said")]
              .map(box => [box.title.split(",")[0], (box.getBoundingClientRect().left - picture.left) / picture.width])""")
        assert [label for label, _ in shown] == said["label"].to_pylist()
        whole = next(reversed(server.api._sounds.values())).n_frames * 0.02
        assert [at * whole for _, at in shown] == pytest.approx(said["start_s"].to_pylist(), abs=0.01)


def test_an_upload_has_no_words_and_phones(chromium: Chromium) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    assert texts(chromium, ".tier") == []


def test_a_file_that_only_the_browser_can_read_is_decoded_there(chromium: Chromium) -> None:
    """WebM, as phones and browsers record: made here by the browser itself."""
    chromium.run("""
        const context = new AudioContext(), tone = context.createOscillator(), end = context.createMediaStreamDestination();
        tone.connect(end); tone.start();
        const recorder = new MediaRecorder(end.stream), parts = [];
        recorder.ondataavailable = event => parts.push(event.data);
        const stopped = new Promise(done => recorder.onstop = done);
        recorder.start(); await new Promise(next => setTimeout(next, 700)); recorder.stop(); await stopped; context.close();
        const files = new DataTransfer(); files.items.add(new File(parts, "tone.webm"));
        const input = document.querySelector("input[type=file]"); input.files = files.files; input.dispatchEvent(new Event("change"))""")
    chromium.wait("document.documentElement.dataset.heard")
    assert "tone.webm" in texts(chromium, ".live-status")[0]
    complaints = chromium.complaints()  # the browser's own word about the server's first answer
    assert len(complaints) == 1 and "422" in complaints[0]


def test_what_is_no_sound_is_said_and_its_name_stays_a_name(chromium: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "<img src=x onerror=document.title='owned'>.wav"
    bad.write_bytes(b"no sound")
    upload(chromium, bad)
    chromium.wait("!document.querySelector('#page > .problem').hidden")
    assert "no audio file" in texts(chromium, "#page > .problem")[0]
    good = bad.rename(bad.with_name(f"good {bad.name}"))
    soundfile.write(good, np.zeros(1600), 16000)
    upload(chromium, good)
    chromium.wait("document.documentElement.dataset.heard")
    assert good.name in texts(chromium, ".live-status")[0]
    assert chromium.run("return [document.title, document.querySelectorAll('main img').length]") == ["Live · hearsae", 0]
    assert len(chromium.complaints()) == 1  # the browser's own word about the refused file


def test_controls_have_names(chromium: Chromium) -> None:
    upload(chromium, CLIP)
    chromium.wait(HEARD)
    names = chromium.run("""
        return [...document.querySelectorAll('button, a, input, select, [role=slider]')]
          .map(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)""")
    assert len(names) > 2 * STRIPS and all(name and name.strip() for name in names)


def test_a_token_opens_the_page_and_leaves_the_address(chromium: Chromium, server: LiveServer) -> None:
    with running(server.files.root, server.api, "0.0.0.0") as other:
        token = other.address.partition("?token=")[2]
        chromium.call("POST", "/url", {"url": f"http://127.0.0.1:{other.server_port}/live?token={token}"})
        chromium.wait("document.documentElement.dataset.shown === 'live'")
        assert chromium.run("return [location.href, document.cookie]") == [f"http://127.0.0.1:{other.server_port}/live", ""]
        upload(chromium, CLIP)
        chromium.wait(HEARD)
        asked = chromium.requests()
        assert all(
            address.startswith((f"http://127.0.0.1:{other.server_port}/", "data:", "about:", server.address.removesuffix("live")))
            for address in asked
        )
        assert chromium.complaints() == []


def test_the_static_page_is_there_and_leads_here(chromium: Chromium, server: LiveServer) -> None:
    chromium.call("POST", "/url", {"url": server.address.removesuffix("live") + "#scan0/feature/3"})
    chromium.wait("document.querySelector('h1')?.textContent === 'Neuron 3'")
    assert chromium.run("return document.querySelector('header a[href=live]').href") == server.address
