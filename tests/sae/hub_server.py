"""A model hub on loopback: as much of the Hugging Face Hub's interface as its client needs to upload and download small files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, bytes]] = {}
        """`owner/name` -> path -> contents."""
        self.visibility: dict[str, str | None] = {}

    def environment(self, home: str, token: str = TOKEN) -> dict[str, str]:
        """What makes the client ask this hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, data: object, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(data).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, message: str, code: str) -> None:
        self.json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid username or password.", "")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                return self.json({"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}, 409)
            self.server.repos[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.server.visibility[name] = asked.get("visibility")
            return self.json({"url": f"{self.server.endpoint}/{name}"})
        if parts == ["api", "validate-yaml"]:
            head = json.loads(body)["content"].split("---")[1]
            return self.json({"errors": [], "warnings": []} if isinstance(yaml.safe_load(head), dict) else {"errors": [{"message": "no mapping"}]})
        if parts[:2] == ["api", "models"] and parts[4:] == ["preupload", "main"]:
            return self.json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if parts[:2] == ["api", "models"] and parts[4:] == ["commit", "main"]:
            name = "/".join(parts[2:4])
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.server.endpoint}/{name}/commit/{sha(self.server.repos[name])}"
            return self.json({"commitUrl": url, "commitOid": sha(self.server.repos[name]), "pullRequestUrl": None})
        self.refuse(404, f"no such thing: {self.path}", "")

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        files = self.server.repos.get(name)
        if files is None:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        known = {"main", sha(files)}
        if parts[:2] == ["api", "models"]:
            rest = parts[4:]
            if rest and rest[1] not in known:
                return self.refuse(404, f"Invalid rev id: {rest[1]}", "RevisionNotFound")
            if not rest or rest[0] == "revision":
                return self.json({"id": name, "sha": sha(files), "siblings": [{"rfilename": path} for path in files]})
            if rest[0] == "tree":
                return self.json([{"type": "file", "path": path, "size": len(data), "oid": oid(data)} for path, data in files.items()])
        path = "/".join(parts[4:])
        if parts[2] != "resolve" or parts[3] not in known or path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        self.send(200, files[path], ETag=f'"{oid(files[path])}"', X_Repo_Commit=sha(files))

    do_HEAD = do_GET


def oid(data: bytes) -> str:
    """As git names contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha(files: dict[str, bytes]) -> str:
    """Stands for the commit."""
    return hashlib.sha1(json.dumps({path: oid(data) for path, data in sorted(files.items())}).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
