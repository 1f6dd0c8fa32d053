"""A small Hugging Face Hub on loopback: the endpoints that huggingface_hub's downloads use, and what can go wrong.

A repository's listing tells sizes and hashes; `resolve` serves whole files and ranges of them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40
TOKEN = "hf_right"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Files of a model.

    Attributes:
        gated: only TOKEN opens its files.
        sent: what is sent instead of a file.
        sizes: what the listing says instead of a file's size.
        cuts: for each file, after how many bytes each answer breaks off, one after the other.
        status: of every answer about a file.
        commit: of its main branch.
    """

    files: dict[str, bytes]
    gated: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    status: int = 200
    commit: str = COMMIT

    def sha256(self, path: str) -> str | None:
        """The hash of a file in LFS."""
        in_lfs = path.endswith((".gguf", ".safetensors"))
        return hashlib.sha256(self.files[path]).hexdigest() if in_lfs else None

    def siblings(self) -> list[dict[str, Any]]:
        """The files as the listing has them."""
        found = []
        for path, data in self.files.items():
            size = self.sizes.get(path, len(data))
            entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": git_oid(data)}
            if sha256 := self.sha256(path):
                entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
            found.append(entry)
        return found


class Hub(ThreadingHTTPServer):
    """The server: `repos` by name, and `requests` as (method, path, Range)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path == "/api/models":
            self._list(parse_qs(url.query))
        elif path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/").removesuffix("/revision/main"))
        else:
            self._file(*path.removeprefix("/").split("/resolve/main/"))

    def _list(self, query: dict[str, list[str]]) -> None:
        (author,), (words,) = query.get("author", [""]), query.get("search", [""])
        names = [
            name for name in self.server.repos if name.startswith(f"{author}/") or (words and words in name)
        ]
        self._json(200, [{"_id": name, "id": name, "modelId": name} for name in names])

    def _info(self, name: str) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        self._json(200, {"_id": name, "id": name, "sha": repo.commit, "siblings": repo.siblings()})

    def _file(self, name: str, path: str) -> None:
        repo = self.server.repos[name]
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json(401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        if repo.status != 200:
            self._json(repo.status, {"error": "no"}, {})
            return
        data = repo.sent.get(path, repo.files[path])
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{repo.sha256(path) or git_oid(repo.files[path])}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repo.cuts.get(path)
        if cuts:
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(data[start:])

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
