"""The hub's own client pushes a release to a local server; the token is in no file, argument or message."""

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
from mcore.errors import ConfigError, InfrastructureError, PipelineError, SourceError, error_from_json
from mcore.registry.promotion import promote
from tests.unit.flows.command_line import mcore_flows
from tests.unit.mcore.registry.judged_runs import through

TOKEN = "hf_planted0123456789abcdefghijklmnop"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload of small files asks for."""

    seen: list[tuple[str, str | None]] = []  # noqa: RUF012  # replaced for each server
    files: dict[str, bytes] = {}  # noqa: RUF012
    made: list[dict[str, Any]] = []  # noqa: RUF012
    refuses = False

    def do_GET(self) -> None:
        self.answer({"sha": "0" * 40, "id": "org/name", "siblings": []})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length is not None else self.chunks()
        if self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/org/name"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/org/name/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": None,
                }
            )
        else:
            self.answer({})

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, content: Any) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        text = json.dumps({"error": f"no access with {TOKEN}"} if self.refuses else content).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Nothing to the tests' output."""


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    """A server, and its address."""
    handler = type("ThisHub", (Hub,), {"seen": [], "files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pushed(folder: Path, endpoint: str, **variables: str) -> tuple[str, PipelineError | None]:
    """Push as the pipeline does. Returns all that was printed, and the error."""
    errors = Path("error.json").absolute()
    errors.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in {"HF_TOKEN", "HF_ENDPOINT"}}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path("home").absolute()), ERROR_FILE_VARIABLE: str(errors)}
    command = [sys.executable, "-m", "mcore.registry", "push", "--folder", str(folder), "--to", "hf:org/name"]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    return done.stdout + done.stderr, error_from_json(errors.read_text()) if errors.exists() else None


def everything_on_disk() -> str:
    return "".join(
        path.read_bytes().decode(errors="replace") for path in Path.cwd().rglob("*") if path.is_file()
    )  # fmt: skip


@pytest.fixture
def released(raw: dict[str, Any]) -> Path:
    _, artifacts = through(raw)
    promote(Store("store"), artifacts["export"], "production", model="small")
    return Path("store/registry/small/production")


def test_weights_and_card_arrive_and_the_token_is_nowhere_else(released: Path, hub: tuple[type[Hub], str]) -> None:
    server, endpoint = hub
    told, error = pushed(released, endpoint, HF_TOKEN=TOKEN)
    assert error is None, told
    assert [made["visibility"] for made in server.made] == ["private"]
    assert {authorization for _, authorization in server.seen} == {f"Bearer {TOKEN}"}
    names = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()} - {"release.json"}
    assert server.files.keys() == names and "adapter/adapter_model.safetensors" in names
    for name in names:
        assert server.files[name] == (released / name).read_bytes()
    assert TOKEN not in told + everything_on_disk()


def test_a_hub_that_refuses_or_is_away_is_told_without_the_token(released: Path, hub: tuple[type[Hub], str]) -> None:
    server, endpoint = hub
    server.refuses = True
    told, error = pushed(released, endpoint, HF_TOKEN=TOKEN)
    assert isinstance(error, SourceError) and "hf:org/name" in str(error)
    away, lost = pushed(released, "http://127.0.0.1:9", HF_TOKEN=TOKEN)
    assert isinstance(lost, InfrastructureError), lost
    assert TOKEN not in told + away + str(error) + everything_on_disk()


def test_without_a_token_nothing_is_sent(released: Path, hub: tuple[type[Hub], str]) -> None:
    server, endpoint = hub
    _, error = pushed(released, endpoint)
    assert isinstance(error, ConfigError) and "HF_TOKEN" in str(error) and server.seen == []


def test_the_command_pushes_what_an_alias_points_to(released: Path, hub: tuple[type[Hub], str]) -> None:
    server, endpoint = hub
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path("home").absolute()), "HF_TOKEN": TOKEN}
    done = mcore_flows("push", "production", "--to", "hf:org/name", cwd=Path.cwd(), **environment)
    assert done.returncode == 0 and "pushed: http://" in done.stdout, done.stderr
    assert "README.md" in server.files and TOKEN not in done.stdout + done.stderr
    server.refuses = True
    refused = mcore_flows("push", "production", "--to", "hf:org/name", cwd=Path.cwd(), **environment)
    assert refused.returncode == 2 and "the hub refuses the model" in refused.stderr and TOKEN not in refused.stderr


def test_the_command_tells_all_that_is_wrong_at_once(released: Path) -> None:
    weights = next(path for path in released.rglob("*.safetensors"))
    weights.resolve().write_text("other")
    done = mcore_flows("push", "production", "--to", "hf:org/name", cwd=Path.cwd(), HF_TOKEN="")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "export/" in done.stderr
    done = mcore_flows("push", "staging", "--to", "org/name", cwd=Path.cwd())
    assert (
        done.returncode == 2 and "nothing was promoted" in done.stderr and "hf:org/name or ms:org/name" in done.stderr
    )
