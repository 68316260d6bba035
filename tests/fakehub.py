"""A model hub on loopback: what huggingface_hub asks of the real one, over HTTP, for the real client.

Large files are redirected to another host name, as the hub does, and served with ranges. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"  # of an account that has accepted every licence
NEWCOMER = "hf_newcomer"  # of one that has not


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    commit: str = "a" * 40


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    repos: dict[str, Repo]
    requests: list[Request] = field(default_factory=list)
    stall_at: int | None = None  # bytes of a large file after which nothing more comes until `go_on` is set
    go_on: threading.Event = field(default_factory=threading.Event)
    status: int | None = None  # answer everything with this

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def ranges(self) -> list[str | None]:
        """The ranges in which large files were asked for."""
        return [request.range for request in self.requests if request.path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if self.hub.status:
            return self._answer(self.hub.status, b"", {"X-Error-Message": "maintenance"})
        if path.startswith("/cdn/"):
            repo, file = path.removeprefix("/cdn/").split("//")
            return self._send_file(self.hub.repos[repo].files[file])
        if path.startswith("/api/models/"):
            name, file = path.removeprefix("/api/models/").split("/revision/")[0], None
        else:
            name, _, rest = path[1:].partition("/resolve/")
            file = rest.partition("/")[2]
        repo = self.hub.repos.get(name)
        if token not in (None, TOKEN, NEWCOMER):
            return self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.private and token != TOKEN):
            # without a token the hub does not say whether there is such a repository
            return self._answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"} if token else {})
        if file is None:
            siblings = [{"rfilename": name} for name in repo.files]
            body = {"id": name, "sha": repo.commit, "private": repo.private, "gated": repo.gated, "siblings": siblings}
            return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if repo.gated and token != TOKEN:
            return self._answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        if file not in repo.files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        content = repo.files[file]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if not file.endswith(".gguf"):
            return self._answer(200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        headers |= {
            "Location": f"http://localhost:{self.hub.port}/cdn/{name}//{file}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self._answer(302, b"", headers)

    def _send_file(self, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Length": str(len(content) - start)}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if "Range" in self.headers else 200)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        until = len(content) if self.hub.stall_at is None else max(start, self.hub.stall_at)
        try:
            self.wfile.write(content[start:until])
            if until < len(content):
                self.hub.go_on.wait()
                self.wfile.write(content[until:])
        except ConnectionError:
            self.close_connection = True  # the client was killed

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
