"""Who may ask the live server: what a page in a browser must not be able to do, from wherever it comes.

- Another site's name that was made to lead here (DNS rebinding): `check_host`.
- Another site that sends to us, or loads our data as its scripts: `check_site`, and the cookie's SameSite.
- Another machine: the token, on every address but loopback.
"""

import hmac
import ipaddress
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple

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
        return is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified and (is_address(bare) or bare == socket.gethostname().lower())

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


def is_address(name: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
