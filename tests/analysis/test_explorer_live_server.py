"""The live server: a real one on loopback, asked as browsers ask, and as nobody should."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from conftest import micro_audio
from test_explorer_live import CLIPS, RATE, SCANS, audio_file, make_live_world

from analysis.explorer import server as serving
from analysis.explorer.admission import Admission, Refusal
from analysis.explorer.export import export
from analysis.explorer.live import Live
from analysis.explorer.live_api import STRIPS, LiveApi
from analysis.explorer.server import LiveServer, Turns
from cache.audio import load_clip
from cache.errors import HearsaeError


@pytest.fixture(scope="module")
def live_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_live_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def live(live_world: Path) -> Live:
    return Live.open([live_world / name for name in SCANS])


@pytest.fixture(scope="module")
def page(live_world: Path) -> Path:
    export([live_world / name for name in SCANS], live_world / "page", audio="none")
    return live_world / "page"


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Any

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


class Client:
    """Asks as a browser's page of the server itself does, unless told otherwise."""

    def __init__(self, server: LiveServer) -> None:
        self.port = server.server_port
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)

    def ask(self, path: str, data: bytes | None = None, method: str | None = None, **headers: str) -> Answer:
        base = f"http://127.0.0.1:{self.port}"
        sent = {"Origin": base} | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(base + path, data, {name: value for name, value in sent.items() if value}, method=method)
        try:
            with self.opener.open(request, timeout=60) as answer:
                return Answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read(), error.headers)

    def raw(self, sent: bytes, more: bytes = b"") -> bytes:
        """The whole answer to bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(sent)
            if more:
                connection.sendall(more)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            return answer

    def status(self, target: str, host: str | None = None, more: str = "") -> int:
        sent = f"GET {target} HTTP/1.1\r\nHost: {host or f'127.0.0.1:{self.port}'}\r\n{more}\r\n"
        return int(self.raw(sent.encode("latin1")).split()[1])

    def hear(self, samples: np.ndarray) -> dict[str, Any]:
        answer = self.ask("/live/api/upload", audio_file(samples))
        assert answer.status == 200, answer.body
        return answer.json


@contextmanager
def running(page: Path, api: LiveApi, host: str = "127.0.0.1") -> Iterator[LiveServer]:
    with LiveServer(page, api, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(page: Path, live: Live) -> Iterator[LiveServer]:
    with running(page, LiveApi(live)) as started:
        yield started


@pytest.fixture
def client(server: LiveServer) -> Client:
    return Client(server)


def test_the_page_and_the_live_page_are_served_with_strict_headers(client: Client) -> None:
    for path, what in (
        ("/", b"assets/app.js"),
        ("/live", b"live/live.js"),
        ("/live/live.js", b"use strict"),
        ("/data/index.js", b"hearsae.register"),
    ):
        answer = client.ask(path)
        assert answer.status == 200 and what in answer.body
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert b'<a href="live">Live</a>' in client.ask("/").body


def test_no_path_leads_out_of_the_page(client: Client, page: Path, live_world: Path) -> None:
    (live_world / "secret.js").write_text("secret")
    (page / "data" / "leads_out.js").unlink(missing_ok=True)
    (page / "data" / "leads_out.js").symlink_to(live_world / "secret.js")
    (page / "data" / ".hidden.js").write_text("secret")
    (page / "data" / "notes.txt").write_text("secret")
    targets = [
        "/../secret.js", "/data/../../secret.js", "/%2e%2e/secret.js", "/data/%2e%2e/%2e%2e/secret.js", "/data/..%2f..%2fsecret.js", "/..\\secret.js",
        "/%2e%2e%5csecret.js", f"/{live_world}/secret.js", f"//{live_world}/secret.js", f"/%2f{str(live_world)[1:].replace('/', '%2f')}%2fsecret.js",
        "/data/leads_out.js", "/data/.hidden.js", "/data/notes.txt", "/data", "/data/", "/assets", "/live/", "/live/server.py", "/live/../server.py",
        "/live/live.py", "/live/%6cive.py", "/secret.js%00.js", "/data/index.js%00", "/live/style.css", "/explorer.json", "/" + "a" * 1000,
    ]  # fmt: skip
    found = {target: client.status(target) for target in targets}
    assert set(found.values()) == {404}, found
    assert client.status("/" + "a" * 3000) == 414
    assert client.status("http://127.0.0.1/live") == 400 and client.status("*") == 400
    assert client.status("/data/index.js") == 200


def test_only_its_own_names_are_answered(client: Client) -> None:
    port = client.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert client.status("/live", host) == 200, host
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"localhost.evil.example:{port}", f"10.0.0.1:{port}", "", f":{port}"):
        assert int(client.raw(f"GET /live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).split()[1]) == 403, host
    assert int(client.raw(b"GET /live HTTP/1.1\r\n\r\n").split()[1]) == 403


def test_other_sites_can_neither_send_nor_load(client: Client) -> None:
    sound = audio_file(np.zeros(320))
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{client.port + 1}"}, {"Origin": ""},
                    {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}):  # fmt: skip
        assert client.ask("/live/api/upload", sound, **headers).status == 403, headers
    assert client.ask("/data/index.js", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors", Sec_Fetch_Dest="script", Origin="").status == 403
    assert client.ask("/live", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document", Origin="").status == 200
    assert client.ask("/live", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe", Origin="").status == 403
    assert client.ask("/live/api/upload", sound, Sec_Fetch_Site="same-origin").status == 200


def test_wrong_methods_are_refused(client: Client) -> None:
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "FOO"):
        answer = client.raw(f"{method} /live HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n\r\n".encode())
        assert answer.split()[1] == b"405" and b"nosniff" in answer, method
    assert client.ask("/live", b"x").status == 405
    assert client.ask("/live/api/upload").status == 405 and client.ask("/live/api/index", b"x").status == 405
    assert client.ask("/live/api/nothing").status == 404
    assert client.raw(b"what is this\r\n\r\n").split()[1] == b"400"


def test_a_file_that_is_too_large_is_refused_before_it_is_read(client: Client, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    head = f"POST /live/api/upload HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nOrigin: http://127.0.0.1:{client.port}\r\n"
    answer = client.raw(f"{head}Content-Length: {serving.UPLOAD_BYTES + 1}\r\n\r\n".encode(), b"x")
    assert b" 413 " in answer.splitlines()[0] and b"50 MB" in answer
    for length in (
        "",
        "Content-Length: -1\r\n",
        "Content-Length: 1e3\r\n",
        "Content-Length: 4\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
    ):
        assert b" 411 " in client.raw(f"{head}{length}\r\n".encode()).splitlines()[0], length
    monkeypatch.setattr(serving, "UPLOAD_BYTES", 100_000)
    answer = client.ask("/live/api/upload", audio_file(np.zeros(RATE * 20)))  # sends all of it, and still sees the answer
    assert answer.status == 413
    assert client.ask("/live/api/upload", audio_file(np.zeros(RATE))).status == 200


def test_a_body_is_read_to_its_announced_length_and_no_further(client: Client) -> None:
    head = f"POST /live/api/upload HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nOrigin: http://127.0.0.1:{client.port}\r\n"
    sound = audio_file(np.zeros(320))
    smuggled = b"GET /live/api/index HTTP/1.1\r\n\r\n"
    answer = client.raw(head.encode() + f"Content-Length: {len(sound)}\r\n\r\n".encode() + sound + smuggled)
    assert answer.count(b"HTTP/1.0 ") == 1 and b" 200 " in answer.splitlines()[0]
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"Content-Length: 5000\r\n\r\n" + sound[:100])
        connection.shutdown(socket.SHUT_WR)
        assert b"broke off" in connection.makefile("rb").read()


def test_a_body_that_dawdles_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "UPLOAD_SECONDS", 0.2)
    head = (
        f"POST /live/api/upload HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nOrigin: http://127.0.0.1:{client.port}\r\nContent-Length: 5000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(head.encode())
        for _ in range(4):
            connection.sendall(b"x")
            threading.Event().wait(0.1)
        connection.shutdown(socket.SHUT_WR)
        assert b" 408 " in connection.makefile("rb").readline()


def test_a_header_that_dawdles_is_given_up(client: Client, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\n")
        with suppress(OSError):  # at some point nobody listens
            for _ in range(50):
                connection.sendall(b"X: 1\r\n")
                threading.Event().wait(0.05)
            pytest.fail("the server went on listening")
    assert client.ask("/live").status == 200 and not server.arriving


def test_what_is_no_sound_is_refused_in_words(client: Client) -> None:
    for data in (b"", b"no sound at all", audio_file(np.zeros(0)), audio_file(np.zeros((4, 200)), 96000)):
        answer = client.ask("/live/api/upload", data)
        assert answer.status == 422 and answer.json["error"]
    assert client.hear(np.zeros(RATE))["n_frames"] == 50  # silence is sound


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_damaged_files_are_heard_as_far_as_they_go_or_refused_in_words(client: Client, format: str) -> None:
    damage = np.random.default_rng(0)
    whole = audio_file(damage.normal(size=RATE // 2) * 0.1, RATE, format)
    for _ in range(20):
        data = bytearray(whole)
        for at in damage.integers(0, min(len(data), damage.choice([60, len(data)])), 6):
            data[at] = damage.integers(256)
        answer = client.ask("/live/api/upload", bytes(data[: damage.integers(1, len(data) + 1)]))
        assert answer.status in (200, 422) and answer.json.get("error", "heard")


def test_questions_that_make_no_sense_are_refused_in_words(client: Client) -> None:
    audio = client.hear(np.zeros(RATE))["audio"]
    questions = (
        "strips?scan=scan0",
        "strips?audio=x&scan=scan0",
        f"strips?audio={audio}&scan=scan9",
        f"strips?audio={audio}&scan=scan0&pinned=384",
        f"strips?audio={audio}&scan=scan0&pinned=-1",
        f"moment?audio={audio}&scan=scan0&frame=50",
        f"moment?audio={audio}&scan=scan0&frame=%D9%A1",
        f"moment?audio={audio}&scan=scan0&frame=1e1",
        "clips?store=1",
        "clips",
        "sound?audio=..%2f..%2f",
        f"compare?audio={audio}&a=scan0",
    )
    for question in questions:
        answer = client.ask(f"/live/api/{question}")
        assert answer.status == 404 and answer.json["error"], question
    assert client.ask(f"/live/api/strips?audio={audio}&scan=scan0&scale=loud").status == 422
    assert client.ask(f"/live/api/clip?store=0&clip={CLIPS}", b"").status == 404
    assert client.ask("/live/api/clips?" + "&".join(f"x{i}=1" for i in range(100))).status in (400, 422)


def test_a_clip_of_the_store_is_found_by_its_words_and_heard(client: Client, live: Live) -> None:
    store = live.scans[0].store
    text, source = store.clips["text"][2].as_py(), store.clips["source"][2].as_py()
    listed = client.ask("/live/api/clips?store=0&search=" + urllib.request.quote(text.upper())).json["clips"]
    assert (2, source, text) in {(row["clip"], row["source"], row["text"]) for row in listed}
    assert client.ask("/live/api/clips?store=0&search=no+such+words").json == {"clips": [], "more": False}
    heard = client.ask("/live/api/clip?store=0&clip=2", b"").json
    assert heard["known"]["text"] == text and heard["n_frames"] == store.clips["n_frames"][2].as_py()
    assert heard["known"]["said"] is None
    samples, rate = soundfile.read(io.BytesIO(client.ask(f"/live/api/sound?audio={heard['audio']}").body))
    assert rate == RATE and samples == pytest.approx(load_clip(store, 2), abs=1e-4)


def test_pinned_features_come_first_and_the_strongest_after_them(client: Client) -> None:
    audio = client.hear(micro_audio(1)[0])["audio"]
    plain = client.ask(f"/live/api/strips?audio={audio}&scan=scan0").json["rows"]
    assert len(plain["feature"]) == STRIPS and plain["pinned"] == 0 and plain["z"] == sorted(plain["z"], reverse=True)
    pinned = client.ask(f"/live/api/strips?audio={audio}&scan=scan0&pinned=7,{plain['feature'][3]}").json["rows"]
    assert pinned["feature"][:3] == [7, plain["feature"][3], plain["feature"][0]] and pinned["pinned"] == 2
    frame = plain["frame"][0]
    moment = client.ask(f"/live/api/moment?audio={audio}&scan=scan0&frame={frame}").json["rows"]
    assert moment["feature"][0] == plain["feature"][0] and moment["value"][0] == plain["value"][0]


def test_several_at_once_all_get_their_own_answer(client: Client) -> None:
    clips, answers = micro_audio(4), dict[int, dict[str, Any]]()

    def hear(i: int) -> None:
        answers[i] = client.hear(clips[i])

    threads = [threading.Thread(target=hear, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[i]["n_frames"] for i in range(4)] == [-(-len(clip) // 320) for clip in clips]
    assert len({answer["audio"] for answer in answers.values()}) == 4


def test_who_comes_when_too_many_wait_is_sent_away(client: Client, server: LiveServer) -> None:
    with server.turns.turn():
        waiting = [threading.Thread(target=client.hear, args=(np.zeros(320),)) for _ in range(serving.WAITING)]
        for thread in waiting:
            thread.start()
        while server.turns._room._value:
            threading.Event().wait(0.01)
        answer = client.ask("/live/api/upload", audio_file(np.zeros(320)))
        assert answer.status == 503 and answer.headers["Retry-After"]
        assert client.ask("/live").status == 200  # pages need no turn
    for thread in waiting:
        thread.join(60)
    assert client.hear(np.zeros(320))["n_frames"] == 1


def test_turns_are_given_one_at_a_time() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        with turns.turn():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_port_in_use_is_said_in_one_line_and_the_usual_one_is_replaced(page: Path, live: Live, server: LiveServer) -> None:
    with pytest.raises(HearsaeError, match=f"can't listen on port {server.server_port} .*choose another --port"):
        LiveServer(page, LiveApi(live), port=server.server_port)
    with pytest.raises(HearsaeError, match="choose another --port"):
        LiveServer(page, LiveApi(live), port=99999)
    with pytest.raises(HearsaeError, match="is no address of this machine"):
        LiveServer(page, LiveApi(live), host="no such host")
    with socket.socket() as taken:
        with suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", serving.PORT))
        taken.listen()
        with LiveServer(page, LiveApi(live)) as other:
            assert other.server_port not in (0, serving.PORT)


def test_beyond_loopback_every_request_needs_the_token(page: Path, live: Live) -> None:
    with running(page, LiveApi(live), "0.0.0.0") as server:
        client = Client(server)
        token = server.address.partition("?token=")[2]
        assert len(token) >= 40 and f":{server.server_port}/live?token=" in server.address
        for path in ("/", "/live", "/live/live.js", "/data/index.js", "/live/api/index", "/explorer.json"):
            assert client.ask(path).status == 401, path
        assert client.ask("/live/api/upload", b"x").status == 401
        assert client.ask("/live?token=wrong").status == 401 and client.ask(f"/live?token={token[:-1]}").status == 401
        assert client.ask("/live", Cookie=f"{server.admission.cookie}=wrong").status == 401
        assert client.ask("/live?token=%F0%9F%8E%B5").status == 401

        entered = client.ask(f"/live?token={token}")
        assert entered.status == 303 and entered.headers["Location"] == "/live" and token not in entered.headers["Location"]
        cookie = entered.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        kept = cookie.split(";")[0]
        assert client.ask("/live", Cookie=kept).status == 200
        assert client.ask("/live/api/index", Cookie=f"other=1; {kept}").status == 200
        assert client.status("/live", f"evil.example:{client.port}", f"Cookie: {kept}\r\n") == 403
        # Another site leads here with the token in the address, but not elsewhere from here.
        assert client.ask(f"//evil.example?token={token}").headers["Location"] == "/"


def test_names_that_a_server_answers_to() -> None:
    def answers(admission: Admission, host: str) -> bool:
        try:
            admission.check_host(host)
        except Refusal:
            return False
        return True

    loopback, everywhere, named = Admission("127.0.0.1", 80, None), Admission("0.0.0.0", 8750, "t"), Admission("studio.example", 8750, "t")
    assert answers(loopback, "127.0.0.1") and answers(loopback, "localhost:80") and not answers(loopback, "192.168.0.7")
    assert answers(everywhere, "192.168.0.7:8750") and answers(everywhere, f"{socket.gethostname()}:8750")
    assert not answers(everywhere, "evil.example:8750") and not answers(everywhere, "192.168.0.7")
    assert answers(named, "studio.example:8750") and not answers(named, "192.168.0.7:8750")


# The command


def explore(live_world: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "explore", str(live_world / "neurons"), "--serve", "--features", "0-9", "--audio", "none", *more]
    place = live_world / "temporary"
    place.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(place)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=environment)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted_and_leaves_nothing(live_world: Path, end: signal.Signals) -> None:
    process = explore(live_world, "--port", "0", "--json")
    try:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        assert said["features"] == 10 and said["reused"] is False and said["left_out"] == []
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(said["address"], timeout=30) as answer:
            assert b"live/live.js" in answer.read()
        assert Path(said["index"]).is_file()
        process.send_signal(end)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
        assert list((live_world / "temporary").glob("hearsae-page-*")) == []
    finally:
        process.kill()


def test_the_command_says_what_is_in_the_way_in_one_line(live_world: Path, server: LiveServer) -> None:
    out, err = explore(live_world, "--port", str(server.server_port)).communicate(timeout=60)
    assert out == "" and err.startswith(f"hearsae: can't listen on port {server.server_port}") and err.count("\n") == 1
    out, err = explore(live_world, "--port", "0", "--model", "no-such-model").communicate(timeout=60)
    assert out == "" and err.startswith("hearsae: there is no model 'no-such-model'") and err.count("\n") == 1
