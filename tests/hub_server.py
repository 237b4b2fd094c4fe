"""A small server of the Hugging Face Hub's protocol, as far as reading models and data sets and uploading take it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves folders as repositories: `{"models/owner/name": folder, "datasets/owner/name": folder}`."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.broken: set[str] = set()  # repositories whose data and weights break off in the middle
        self.uploads: Path | None = None  # a folder that takes uploads, from those who know TOKEN
        self.visibility: dict[str, str | None] = {}  # of what was made; None leaves it to the owner's settings

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[HubServer]:
    server = HubServer(repositories)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if (self.command in ("POST", "PUT") and parts[-1] != "main") or parts[-2] in ("preupload", "commit"):
            self.take(parts)
        elif parts[0] == "api" and len(parts) >= 4:
            self.answer_about("/".join(parts[1:4]), parts[4:])
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self.send_file("/".join([kind, *parts[:2]]), parts[2:])

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def take(self, parts: list[str]) -> None:
        """Make a repository, check a card's metadata, and take files: small ones in the commit, weights before it."""
        if self.server.uploads is None or self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self.refuse("Forbidden", 403)
        content = json.loads(self.body) if self.body[:1] == b"{" and parts[-2] != "commit" else {}
        if parts == ["api", "repos", "create"]:
            name = f"{content['organization']}/{content['name']}"
            about = {"url": f"{self.server.endpoint}/{name}", "id": name, "name": name}
            if name in self.server.visibility:
                return self.send(json.dumps(about).encode(), {"Content-Type": "application/json"}, status=409)
            older = {True: "private", False: "public"}.get(content.get("private"))
            self.server.visibility[name] = content.get("visibility", older)
            (self.server.uploads / name).mkdir(parents=True, exist_ok=True)
            return self.send_json(about)
        if parts == ["api", "validate-yaml"]:
            from huggingface_hub import ModelCard

            card = ModelCard(content["content"])  # raises on metadata that cannot be read
            assert card.data.pipeline_tag
            return self.send_json({"errors": [], "warnings": []})
        if parts[-2] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in content["files"]
            ]
            return self.send_json({"files": modes})
        if parts[-2:] == ["objects", "batch"]:
            objects = [
                {**file, "actions": {"upload": {"href": f"{self.server.endpoint}/blobs/{file['oid']}"}}}
                for file in content["objects"]
            ]
            return self.send_json({"transfer": "basic", "objects": objects})
        if parts[0] == "blobs":
            assert hashlib.sha256(self.body).hexdigest() == parts[1]
            (self.server.uploads / parts[1]).write_bytes(self.body)
            return self.send(b"", {})
        folder = self.server.uploads.joinpath(*parts[2:4])  # /api/models/owner/name/commit/main
        for line in map(json.loads, self.body.splitlines()):
            file, target = line["value"], folder / line["value"].get("path", "")
            if line["key"] == "deletedFile":
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                target.write_bytes(base64.b64decode(file["content"]))
            elif line["key"] == "lfsFile":
                (self.server.uploads / file["oid"]).rename(target)
        address = f"{self.server.endpoint}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
        return self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": address})

    def answer_about(self, repository: str, rest: list[str]) -> None:
        """`/api/datasets/owner/name`, `.../revision/main`, `.../tree/main/folder`, `.../paths-info/main`."""
        folder = self.server.repositories.get(repository)
        if folder is None:
            return self.refuse("RepoNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            start = folder.joinpath(*rest[2:])
            if not start.is_dir():
                return self.refuse("EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive") in (["true"], ["True"], ["1"])
            return self.send_json([entry(folder, path) for path in (start.rglob if recursive else start.glob)("*")])
        if rest[:1] == ["paths-info"]:
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            return self.send_json([entry(folder, folder / path) for path in asked if (folder / path).exists()])
        name = repository.partition("/")[2]
        private = self.server.visibility.get(name) == "private"
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        return self.send_json(
            {
                "_id": "0",
                "id": name,
                "sha": COMMIT,
                "private": private,
                "tags": [],
                "siblings": siblings,
                "downloads": 0,
            }
        )

    def send_file(self, repository: str, rest: list[str]) -> None:
        """`/owner/name/resolve/main/config.json`, and the same under `/datasets`."""
        folder = self.server.repositories.get(repository)
        if folder is None or rest[:1] != ["resolve"]:
            return self.refuse("RepoNotFound")
        path = folder.joinpath(*rest[2:])
        if not path.is_file():
            return self.refuse("EntryNotFound")
        content, headers = path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(path)}"'}
        if self.command == "GET" and repository in self.server.broken and path.suffix in (".safetensors", ".jsonl"):
            headers["Content-Length"] = str(len(content))
            content, self.close_connection = content[: len(content) // 2], True
        return self.send(content, headers)

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str, status: int = 404) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Tests read `requests` in place of a log on stderr."""


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": digest(path), "size": path.stat().st_size}
