"""A model hub on the loopback interface, for the hubs' real clients: the few requests that they make of one.

Revisions are folders `<root>/<org>/<name>/<commit>/`, and branches files beside them that hold a commit.
Source: huggingface_hub 2.4 and modelscope-hub 0.5 (their requests and the fields that they read).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder of models and data sets; yields the address and the list of files asked for, as it grows."""
    served: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_args: Any) -> None:
            pass

        def _answer(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            path = unquote(url.path)
            if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._hf_info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
                self._hf_tree(match[1], match[2])
            elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
                self._ms_files(match[1], query["Revision"])
            elif match := re.fullmatch(r"/api/v1/datasets/([^/]+/[^/]+)/repo/tree", path):
                self._ms_files(match[1], query["Revision"], page=int(query.get("PageNumber", 1)))
            elif match := re.fullmatch(r"/api/v1/(?:models|datasets)/([^/]+/[^/]+)/revisions", path):
                branches = [{"Revision": "master", "CreatedAt": 1}]
                self._json({"Code": 200, "Success": True, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}})
            elif match := re.fullmatch(r"/api/v1/(?:models|datasets)/([^/]+/[^/]+)/repo", path):
                self._file(match[1], query["Revision"], query["FilePath"])
            else:
                self._json({"error": f"no such request: {path}"}, status=404)

        def _folder(self, repo: str, revision: str) -> Path | None:
            branch = root / repo / f"{revision}.branch"
            folder = root / repo / (branch.read_text() if branch.is_file() else revision)
            return folder if folder.is_dir() else None

        def _hf_info(self, repo: str, revision: str) -> None:
            folder = self._folder(repo, revision)
            if folder is None:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            siblings = [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            self._json({"id": repo, "sha": folder.name, "siblings": siblings, "tags": [], "private": False})

        def _hf_tree(self, repo: str, revision: str) -> None:
            folder = self._folder(repo, revision)
            paths = [] if folder is None else [path for path in sorted(folder.rglob("*")) if path.is_file()]
            self._json(
                [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder or path)),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in paths
                ]
            )

        def _ms_files(self, repo: str, revision: str, page: int = 1) -> None:
            folder = self._folder(repo, revision)
            if folder is None:
                self._json({"Code": 10010205001, "Message": "no such model", "Success": False}, status=404)
                return
            files = [
                {
                    "Path": str(path.relative_to(folder)),
                    "Name": path.name,
                    "Size": path.stat().st_size,
                    "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "Type": "blob",
                    "Revision": folder.name,
                }
                for path in sorted(folder.rglob("*"))
                if path.is_file() and page == 1
            ]
            self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

        def _file(self, repo: str, revision: str, name: str) -> None:
            folder = self._folder(repo, revision)
            if folder is None or not (folder / name).is_file():
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            served.append(name)
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"ETag": f'"{digest}"', "X-Repo-Commit": folder.name, "Accept-Ranges": "bytes"})

        def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
