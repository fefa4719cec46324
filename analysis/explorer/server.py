"""The server of the live page: the exported page's files, the live page beside them, and `LiveApi`'s answers. Of the standard library alone.

A few routes with small answers need no web framework. Who may ask is decided in `admission`; which files may leave, in `PageFiles`.
Python's http.server speaks HTTP/1.0 here: a connection carries one request, so none can hide in another one's body.
"""

import ipaddress
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from analysis.explorer.admission import Admission, Refusal, Reply, is_address, json_reply
from analysis.explorer.live_api import LiveApi, Missing
from cache.errors import HearsaeError

PORT = 8750
"""Tried first where no port is asked for; then any free one."""
UPLOAD_BYTES = 50 << 20
"""Five minutes of CD sound as WAV, of which 30 s are heard."""
UPLOAD_SECONDS = 60.0
"""For the whole body."""
IDLE_SECONDS = 15.0
"""For the next bytes of a request, or room for those of an answer."""
HEADER_SECONDS = 20.0
"""For a request's header, all of it."""
DRAIN_SECONDS = 2.0
"""How long a body that is refused is read and forgotten: a client that is still sending would not see the answer."""
CONNECTIONS = 64
"""At once; more are closed. A page of a browser opens 6."""
WAITING = 4
"""Questions that wait for the one being computed."""
WAIT_SECONDS = 60.0
ADDRESS_CHARACTERS = 2048
FIELDS = 16
"""Of a question."""
BLOCK_BYTES = 1 << 16

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
"""Of the files that are served; others are not."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # The page's data are scripts: without this, any site could load them.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}
LIVE_LINK = b'<a href="live">Live</a>\n</header>'
"""In the static page's header, where it is served with a live one."""


class PageFiles:
    """The files of an exported page, and the live page's own, which come with hearsae. Nothing else, wherever a path or a link leads."""

    def __init__(self, page: Path) -> None:
        self.root = page.resolve()
        self.own = {
            asset.name: asset for asset in resources.files("analysis.explorer").iterdir() if re.fullmatch(r"live\w*\.(html|js|css)", asset.name)
        }

    def find(self, path: str) -> Reply:
        """The file at a decoded path of an address. Raises Refusal (404) for all that is not one of ours."""
        parts = path.removeprefix("/").split("/")
        if path == "/":
            parts = ["index.html"]
        if parts == ["live"]:
            parts = ["live", "live.html"]
        if len(parts) == 2 and parts[0] == "live" and parts[1] in self.own:
            return Reply(200, self.own[parts[1]].read_bytes(), TYPES[Path(parts[1]).suffix], {"Cache-Control": "no-cache"})
        if any(not re.fullmatch(r"[\w-]+(\.[\w-]+)*", part) for part in parts):  # no dots alone, no backslash, no NUL, nothing hidden, nothing empty
            raise Refusal(404, "there is nothing here")
        try:
            file = self.root.joinpath(*parts).resolve(strict=True)
            if not file.is_relative_to(self.root) or not file.is_file() or file.suffix not in TYPES:
                raise Refusal(404, "there is nothing here")
            data = file.read_bytes().replace(b"</header>", LIVE_LINK, 1) if path == "/" else file.read_bytes()
            return Reply(200, data, TYPES[file.suffix], {"Cache-Control": "no-cache"})
        except (OSError, ValueError):
            raise Refusal(404, "there is nothing here") from None


class Turns:
    """One computation at a time, a few that wait; who comes then is sent away."""

    def __init__(self) -> None:
        self._computing = threading.Lock()
        self._room = threading.BoundedSemaphore(1 + WAITING)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Raises Refusal (503) where too many wait, or it takes too long."""
        if not self._room.acquire(blocking=False):
            raise Refusal(503, "too many sounds wait to be heard: try again in a moment", {"Retry-After": "2"})
        try:
            if not self._computing.acquire(timeout=WAIT_SECONDS):
                raise Refusal(503, "the computation before this one takes too long: try again", {"Retry-After": "10"})
            try:
                yield
            finally:
                self._computing.release()
        finally:
            self._room.release()


class LiveServer(ThreadingHTTPServer):
    """`LiveServer(page, api)` listens; `serve_forever()` answers until `shutdown()`; a context manager that closes it."""

    daemon_threads = True  # an upload that dawdles does not keep the process
    block_on_close = False

    def __init__(self, page: Path, api: LiveApi, host: str = "127.0.0.1", port: int | None = None) -> None:
        """page: an exported page. port: None takes `PORT`, or any free one where that is taken; 0 any free one.

        Raises HearsaeError where the address can't be used.
        """
        family, address = _resolve(host)
        self.address_family = family
        self.files, self.api, self.turns = PageFiles(page), api, Turns()
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self.arriving: dict[socket.socket, float] = {}
        """Connections whose request's header is not all there, and since when."""
        try:
            super().__init__((address, PORT if port is None else port), _Handler)
        except (OSError, OverflowError) as error:
            if port is not None:
                raise HearsaeError(
                    f"can't listen on port {port} of {host} ({getattr(error, 'strerror', None) or error}): choose another --port"
                ) from None
            try:
                super().__init__((address, 0), _Handler)
            except OSError as other:
                raise HearsaeError(f"can't listen on {host}: {other.strerror or other}") from None
        token = None if ipaddress.ip_address(address).is_loopback else secrets.token_urlsafe(32)
        self.admission = Admission(host, self.server_address[1], token)

    def server_bind(self) -> None:
        """Without the look-up of the machine's name, which may take seconds and serves nothing here."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def address(self) -> str:
        """What to open, token and all."""
        host = self.admission.host
        if is_address(host) and ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.server_port}/live" + (f"?token={self.admission.token}" if self.admission.token else "")

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, as long as there are not too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives the place back when it is done."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def service_actions(self) -> None:
        """Every now and then: ends connections whose header dawdles. A socket's own timeout starts anew with every byte."""
        for connection, since in list(self.arriving.items()):
            if time.monotonic() - since > HEADER_SECONDS:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to tell of."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise HearsaeError(f"--host {host} is no address of this machine: {getattr(error, 'strerror', None) or error}") from None
    return family, str(address[0])


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: LiveServer
    server_version = "hearsae"
    sys_version = ""
    timeout = IDLE_SECONDS

    def setup(self) -> None:
        """Before anything is read."""
        self.server.arriving[self.request] = time.monotonic()
        super().setup()

    def finish(self) -> None:
        """When all is answered."""
        self.server.arriving.pop(self.request, None)
        super().finish()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.arriving.pop(self.request, None)
        self._unread = 0
        try:
            reply = self._reply()
        except Refusal as refusal:
            reply = json_reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except Missing as error:
            reply = json_reply({"error": str(error)}, 404)
        except HearsaeError as error:
            reply = json_reply({"error": str(error)}, 422)
        except OSError:  # the client went away, or sent nothing for too long
            return
        except Exception:
            traceback.print_exc()
            reply = json_reply({"error": "the server failed: its terminal says why"}, 500)
        self._send(reply)
        self._drain()

    def _reply(self) -> Reply:
        admission, address = self.server.admission, self.path
        self._unread = self._length() if self.command == "POST" else 0
        if len(address) > ADDRESS_CHARACTERS:
            raise Refusal(414, "this address is too long")
        admission.check_host(self.headers.get("Host"))
        admission.check_site(self.command, self.headers)
        if not address.startswith("/"):
            raise Refusal(400, "this is no path")
        try:
            parts = urlsplit(f"http://ours{address}")
            path, question = unquote(parts.path, errors="replace"), dict(parse_qsl(parts.query, max_num_fields=FIELDS))
        except ValueError:
            raise Refusal(400, "this is no question") from None
        entered = admission.enter(path, question) if self.command == "GET" else None
        if entered:
            return entered
        admission.check_token(self.headers)
        if path.startswith("/live/api/"):
            return self._ask(path.removeprefix("/live/api/"), question)
        if self.command != "GET":
            raise Refusal(405, "files can only be read", {"Allow": "GET"})
        return self.server.files.find(path)

    def _ask(self, what: str, question: dict[str, str]) -> Reply:
        api = self.server.api
        reading = {"index": lambda _: api.index(), "clips": api.clips}
        computing = {"strips": api.strips, "moment": api.moment, "compare": api.compare}
        allowed = "POST" if what in ("upload", "clip") else "GET"
        if what not in (*reading, *computing, "upload", "clip", "sound"):
            raise Refusal(404, "there is nothing here")
        if self.command != allowed:
            raise Refusal(405, f"this is asked with {allowed}", {"Allow": allowed})
        if what in reading:
            return json_reply(reading[what](question))
        if what == "sound":
            return Reply(200, api.wav(question), "audio/wav", {"Cache-Control": "no-store"})
        data = self._body() if what == "upload" else b""
        with self.server.turns.turn():
            if what == "upload":
                return json_reply(api.hear_upload(data))
            return json_reply(api.hear_clip(question) if what == "clip" else computing[what](question))

    def _length(self) -> int:
        """Of the body. Raises Refusal for one whose length is not known or too large: before any of it is read."""
        given = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") is not None or len(given) != 1 or not re.fullmatch(r"\d{1,15}", given[0].strip(), re.ASCII):
            raise Refusal(411, "a body must say its length")
        length = int(given[0])
        if length > UPLOAD_BYTES:
            self._unread = length
            raise Refusal(413, f"this file is too large: at most {UPLOAD_BYTES >> 20} MB are taken, of which the first 30 s are heard")
        return length

    def _body(self) -> bytes:
        """All of it, and nothing beyond. Raises Refusal where it comes too slowly or stops short."""
        data, until = bytearray(), time.monotonic() + UPLOAD_SECONDS
        while self._unread:
            block = self.rfile.read1(min(self._unread, BLOCK_BYTES))
            self._unread -= len(block)
            data += block
            if not block:
                self._unread = 0
                raise Refusal(400, "the file broke off before its end")
            if time.monotonic() > until:
                raise Refusal(408, f"the file took longer than {UPLOAD_SECONDS:g} s to arrive")
        return bytes(data)

    def _drain(self) -> None:
        """Reads and forgets for a while what a client still sends, so that it gets to see the answer."""
        until = time.monotonic() + DRAIN_SECONDS
        with suppress(OSError):
            if self._unread:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(DRAIN_SECONDS)
            while self._unread > 0 and time.monotonic() < until and (block := self.rfile.read1(BLOCK_BYTES)):
                self._unread -= len(block)

    def _send(self, reply: Reply) -> None:
        if self.request_version == "HTTP/0.9":  # which has no status and no headers
            self.request_version = "HTTP/1.0"
        with suppress(OSError):
            self.send_response(reply.status)
            for name, value in (HEADERS | {"Content-Type": reply.type, "Content-Length": str(len(reply.body))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself: methods that do not exist, lines that are no HTTP."""
        self.close_connection = True
        status = 405 if code == 501 else int(code)
        self._send(json_reply({"error": message or "this is no request"}, status, {"Allow": "GET, POST"} if status == 405 else {}))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses may hold the token."""
