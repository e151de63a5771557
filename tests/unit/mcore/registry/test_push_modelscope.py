"""ModelScope's own client pushes a release to a local server that answers as that hub's interface does."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mcore.artifacts import Store
from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import InfrastructureError, PipelineError, SourceError, error_from_json
from mcore.registry.promotion import promote
from tests.unit.mcore.registry.judged_runs import through
from tests.unit.tasks.model_folders import listing

TOKEN = "ms-planted-0123456789abcdef"

pytestmark = pytest.mark.long  # the client takes seconds to import


class ModelScope(BaseHTTPRequestHandler):
    """As much of ModelScope as an upload asks for: a repository, large files by their digest, a commit."""

    made: list[dict[str, Any]] = []  # noqa: RUF012  # replaced for each server
    blobs: dict[str, bytes] = {}  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012
    seen: list[tuple[str, str]] = []  # noqa: RUF012
    refuses = False

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/v1/models":
            if any(one["Path"] == sent["Path"] and one["Name"] == sent["Name"] for one in self.made):
                self.answer({}, code=10020101001, message="the model already exists", status=400)
                return
            self.made.append(sent)
            self.answer({"Name": sent["Name"]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = [
                {"oid": one["oid"], "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{one['oid']}"}}}
                for one in sent["objects"]
                if one["oid"] not in self.blobs
            ]
            self.answer({"objects": wanted})
        elif "/commit/" in self.path:
            for action in sent["actions"]:
                is_large = action["type"] == "lfs"
                content = self.blobs[action["sha256"]] if is_large else base64.b64decode(action["content"])
                self.files[action["path"]] = content
            self.answer({"oid": "1"})
        else:
            self.answer({})

    def answer(self, data: Any, *, code: int = 200, message: str = "", status: int = 200) -> None:
        self.seen.append((self.path, f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"))
        if self.refuses:
            code, message, status = 10010205001, f"no access with {TOKEN}", 401
        document = {"Code": code, "Success": status == 200, "Message": message, "Data": data}
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Nothing to the tests' output."""


@pytest.fixture
def hub() -> Iterator[tuple[type[ModelScope], str]]:
    """A server, and its address."""
    handler = type("ThisHub", (ModelScope,), {"made": [], "blobs": {}, "files": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pushed(folder: Path, endpoint: str) -> tuple[str, PipelineError | None]:
    """Push as the pipeline does. Returns all that was printed, and the error."""
    errors = Path("error.json").absolute()
    errors.unlink(missing_ok=True)
    home = str(Path("home").absolute())
    environment = {**os.environ, "MODELSCOPE_ENDPOINT": endpoint, "MODELSCOPE_API_TOKEN": TOKEN, "HOME": home,
                   "MODELSCOPE_HOME": home, "MODELSCOPE_CACHE": home, ERROR_FILE_VARIABLE: str(errors)}  # fmt: skip
    command = [sys.executable, "-m", "mcore.registry", "push", "--folder", str(folder), "--to", "ms:org/name"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr, error_from_json(errors.read_text()) if errors.exists() else None


def everything_on_disk() -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in Path.cwd().rglob("*") if path.is_file())


def test_weights_and_card_arrive_and_the_token_is_nowhere_else(
    raw: dict[str, Any], hub: tuple[type[ModelScope], str]
) -> None:
    server, endpoint = hub
    _, artifacts = through(raw)
    promote(Store("store"), artifacts["export"], "production", model="small")
    released = Path("store/registry/small/production")
    before = listing(Path("store"))
    told, error = pushed(released, endpoint)
    assert error is None, told
    assert [(made["Path"], made["Name"], made["Visibility"]) for made in server.made] == [("org", "name", 1)]  # private
    assert all(TOKEN in credentials for _, credentials in server.seen)
    names = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()} - {"release.json"}
    assert server.files.keys() == names and "adapter/adapter_model.safetensors" in names
    for name in names:
        assert server.files[name] == (released / name).read_bytes()
    assert listing(Path("store")) == before  # the client keeps no notes in a release, which never changes
    again, error = pushed(released, endpoint)  # into a repository that is there
    assert error is None and len(server.made) == 1, again

    server.refuses = True
    refused, error = pushed(released, endpoint)
    assert isinstance(error, SourceError) and "ms:org/name" in str(error), refused
    away, lost = pushed(released, "http://127.0.0.1:9")
    assert isinstance(lost, InfrastructureError), away
    assert TOKEN not in told + again + refused + away + str(error) + str(lost) + everything_on_disk()
