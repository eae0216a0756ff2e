"""A server on this machine that answers as the Hugging Face Hub does where models are fetched."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves the folder `model` as the one revision of the model `name`.

    `gated` models answer that terms must be accepted. A file in `cut` is cut off once, halfway.
    `requests` has method, path, and range of each request.
    """

    def __init__(self, model: Path, *, name: str) -> None:
        self.model, self.name = model, name
        self.gated = False
        self.cut: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def fetched(self) -> set[str]:
        """Returns the names of the files whose content was asked for."""
        begin = f"/{self.name}/resolve/{COMMIT}/"
        return {
            path.removeprefix(begin)
            for method, path, _ in self.requests
            if method == "GET" and path.startswith(begin)
        }

    @contextmanager
    def serving(self) -> Iterator["HubServer"]:
        """Serves while the context lasts."""
        thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def _handler_of(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            server.requests.append((self.command, path, self.headers.get("Range")))
            api, files = f"/api/models/{server.name}", f"/{server.name}/resolve/"
            if not path.startswith((f"{api}/", files)) and path != api:
                self._refuse(401, "RepoNotFound")
            elif server.gated and path.startswith(files):
                self._refuse(403, "GatedRepo")
            elif path.startswith(files):
                revision, _, file = path.removeprefix(files).partition("/")
                self._send_file(file) if self._known(revision) else None
            else:
                kind, _, revision = path.removeprefix(api).strip("/").partition("/")
                if self._known(revision or "main"):
                    self._send_json(self._tree() if kind == "tree" else self._info())

        def _known(self, revision: str) -> bool:
            if revision in ("main", COMMIT):
                return True
            self._refuse(404, "RevisionNotFound")
            return False

        def _info(self) -> dict[str, Any]:
            siblings = [{"rfilename": path.name} for path in server.model.iterdir()]
            return {
                "id": server.name, "modelId": server.name, "sha": COMMIT, "private": False,
                "gated": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
            }  # fmt: skip

        def _tree(self) -> list[dict[str, Any]]:
            return [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)}
                for p in sorted(server.model.iterdir())
            ]

        def _send_json(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_file(self, name: str) -> None:
            path = server.model / name
            if not path.is_file():
                self._refuse(404, "EntryNotFound")
                return
            body, first = path.read_bytes(), 0
            if given := self.headers.get("Range"):
                first = int(given.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{_etag(path)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in server.cut:
                server.cut.discard(name)
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body[first:])

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
