"""The server of the live page: the exported page's files, the live page beside them, and `LiveApi`'s answers. Of the standard library alone.

A few routes with small answers need no web framework. What a page in a browser must not be able to do, from wherever it comes, is decided in
`_Admission`; which files may leave, in `PageFiles`. Python's http.server speaks HTTP/1.0 here: a connection carries one request, so none can
hide in another one's body.
"""

import hmac
import ipaddress
import json
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

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
DRAIN_SECONDS = 2.0
"""How long a body that is refused is read and forgotten: a client that is still sending would not see the answer."""
CONNECTIONS = 64
"""At once; more are closed. A page of a browser opens 6."""
WAITING = 4
"""Questions that wait for the one being computed."""
WAIT_SECONDS = 60.0
ADDRESS_CHARACTERS = 2048
BLOCK_BYTES = 1 << 16

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
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
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Reply(NamedTuple):
    """An answer."""

    status: int
    body: bytes
    type: str
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


class Refusal(Exception):
    """A request that is not answered as asked."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    """JSON, which no browser takes for anything else."""
    return Reply(status, json.dumps(value, allow_nan=False).encode(), "application/json", {"Cache-Control": "no-store"} | (headers or {}))


# Which files may leave


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
            return Reply(200, file.read_bytes(), TYPES[file.suffix], {"Cache-Control": "no-cache"})
        except (OSError, ValueError):
            raise Refusal(404, "there is nothing here") from None


# Who may ask


@dataclass(frozen=True)
class Admission:
    """Who may ask: checked before anything of a request is looked at."""

    host: str
    """As given."""
    port: int
    token: str | None
    """What every request must bring; None on loopback."""

    @property
    def cookie(self) -> str:
        """Its name: a browser gives a host's cookies to all of its ports."""
        return f"hearsae-{self.port}"

    def check_host(self, header: str | None) -> None:
        """A site whose name was made to lead here (DNS rebinding) still sends its own name. Raises Refusal."""
        name, colon, port = (header or "").rpartition(":") if not (header or "").endswith("]") else (header, "", "")
        if not colon:
            name, port = header or "", "80"
        if port != str(self.port) or not self._is_ours((name or "").lower()):
            raise Refusal(403, f"this server does not answer to the name '{(header or '')[:80]}': use the address that it printed")

    def _is_ours(self, name: str) -> bool:
        bare = name.removeprefix("[").removesuffix("]")
        if self.token is None:
            return name in LOOPBACK_NAMES or bare == self.host.lower()
        if bare == self.host.lower() or name in LOOPBACK_NAMES:
            return True
        # Bound to every address of the machine. An address can't be rebound; of names only the machine's own.
        return (
            _is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified and (_is_address(bare) or bare == socket.gethostname().lower())
        )

    def check_site(self, method: str, headers: Any) -> None:
        """A page of another site may open ours, but neither send to it nor load from it. Raises Refusal."""
        site, mode = headers.get("Sec-Fetch-Site"), headers.get("Sec-Fetch-Mode")
        followed_a_link = method == "GET" and mode == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        if site not in (None, "same-origin", "none") and not followed_a_link:
            raise Refusal(403, "this was asked for by another site")
        origin = headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{headers.get('Host', '').lower()}":
            raise Refusal(403, "this was asked for by another site")
        if method == "POST" and origin is None and site != "same-origin":
            raise Refusal(403, "a POST must say where it comes from: send Origin, as browsers do")

    def check_token(self, headers: Any) -> None:
        """The cookie that `enter` gave. Raises Refusal."""
        if self.token is None:
            return
        cookies = SimpleCookie()
        with suppress(CookieError):
            cookies.load(headers.get("Cookie", ""))
        morsel = cookies.get(self.cookie)
        if not _equal(morsel.value if morsel else "", self.token):
            raise Refusal(401, "open the address that 'hearsae explore --serve' printed, with its token")

    def enter(self, path: str, question: dict[str, str]) -> Reply | None:
        """For an address with the right token: back to it without, and a cookie that no script can read and no other site sends along."""
        if self.token is None or "token" not in question:
            return None
        if not _equal(question["token"], self.token):
            raise Refusal(401, "this token is not the one of this server: it is another one each time that it starts")
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        return Reply(303, b"", "text/plain", {"Location": "/live" if path == "/live" else "/", "Set-Cookie": cookie, "Cache-Control": "no-store"})


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# The server


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
        if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
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

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
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
        parts = urlsplit(f"http://ours{address}")
        path, question = unquote(parts.path, errors="replace"), dict(parse_qsl(parts.query, max_num_fields=16))
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
