"""A real S3 protocol server on loopback (moto's) behind a proxy that can misbehave as object stores and networks do.

with running_s3() as s3:
    s3.make_bucket("speech")
    s3.faults = {"503": 0.1, "cut": 0.1}        # parts of the requests
    ... AWS_ENDPOINT_URL=s3.url, AWS_ACCESS_KEY_ID=s3.KEY ...
    assert s3.injected["cut"] > 0
"""

import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
import xml.sax.saxutils
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "lost", "slow", "cut", "reset")
"""500 and 503: answered instead of done. lost: done, but answered with 500. slow: half a second late. cut: the answer's body breaks off in its
middle. reset: the connection is reset instead of an answer."""
SLOW_S = 0.5


class S3:
    """The proxy's side that tests see."""

    KEY, SECRET = "an-access-key", "a-secret-key"

    def __init__(self, upstream: tuple[str, int], seed: int) -> None:
        self.upstream = upstream
        self.bucket = ""
        self.faults: dict[str, float] = {}
        """Fault -> part of the requests that it befalls."""
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        """`GET`, `PUT`, `HEAD`, ... and `LIST`."""
        self.log: list[tuple[str, str]] = []
        """Method and path of each request, in the order in which they came."""
        self.bytes_sent = 0
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        """Requests (method, path) that are answered with 403, as by a policy."""
        self.refuses_other_keys = True
        self._seed, self._random = seed, random.Random(seed)
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Proxy,), {"s3": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this server, and no other."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.KEY,
            "AWS_SECRET_ACCESS_KEY": self.SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }

    def forget(self) -> None:
        """Starts to count and to behave anew."""
        self.faults, self.log, self.bytes_sent, self.refuses_other_keys = {}, [], 0, True
        self.refuses = lambda method, path: False
        self._random.seed(self._seed)
        self.injected.clear()
        self.requests.clear()

    def make_bucket(self, name: str) -> None:
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request("PUT", f"/{name}", headers={"Content-Length": "0"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()

    def draw(self, method: str, target: str) -> str:
        """The fault that befalls this request, if any."""
        with self._lock:
            self.log.append((method, target))
            self.requests["LIST" if method == "GET" and "list-type=" in target else method] += 1
            number = self._random.random()
            for fault, share in self.faults.items():
                number -= share
                if number < 0:
                    self.injected[fault] += 1
                    return fault
        return ""


class _Proxy(BaseHTTPRequestHandler):
    s3: S3
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client left, or we did
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        done = super().handle_expect_100()
        self.wfile.flush()  # the client sends nothing more until it has this
        return done

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.s3.refuses_other_keys and f"Credential={S3.KEY}/" not in self.headers.get("Authorization", ""):
            self._answer_error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
            return
        if self.s3.refuses(self.command, self.path):
            self._answer_error(403, "AccessDenied", "Access Denied")
            return
        fault = self.s3.draw(self.command, self.path)
        if fault == "500":
            self._answer_error(500, "InternalError", "We encountered an internal error. Please try again.")
        elif fault == "503":
            self._answer_error(503, "SlowDown", "Please reduce your request rate.")
        elif fault == "reset":
            self._reset()
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def _forward(self, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(*self.s3.upstream)
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={S3.KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"}
        headers |= {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self._answer_error(500, "InternalError", "We encountered an internal error. Please try again.")
            return
        if fault == "slow":
            time.sleep(SLOW_S)
        self.send_response_only(answer.status)
        length = answer.headers.get("Content-Length") or str(len(data))
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.s3.bytes_sent += len(data)
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.wfile.flush()
        if fault == "cut":
            self._reset()

    def _answer_error(self, status: int, code: str, message: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{xml.sax.saxutils.escape(message)}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)
        self.wfile.flush()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no farewell: RST
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running_s3(seed: int = 0) -> Iterator[S3]:
    """Both servers, in threads of this process, on ports of their own."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    upstream = moto.get_host_and_port()
    s3 = S3((upstream[0], upstream[1]), seed)
    thread = threading.Thread(target=s3.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        s3.server.shutdown()
        s3.server.server_close()
        moto.stop()


if __name__ == "__main__":  # python tests/s3_server.py '{"503": 0.1}': for a look by hand, and for benchmarks/object_store.py
    with running_s3() as s3:
        s3.make_bucket("bucket")
        s3.faults = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
        print(json.dumps(s3.environment | {"without_proxy": "http://{}:{}".format(*s3.upstream)}), flush=True)
        sys.stdin.read()  # until whoever started it is gone
