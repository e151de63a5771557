"""The token for a hub comes out of a Prefect Secret block, in the run, and is nowhere else: real server and worker."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mcore.artifacts import Store
from mcore.registry.aliases import Registry
from tests.flows.conftest import Workspace
from tests.flows.prefect_server import Server, running_server, wait_until
from tests.flows.workspace import VLLM_PYTHON, raw_run
from tests.unit.mcore.registry.test_push import TOKEN, Hub

pytestmark = [pytest.mark.server, pytest.mark.operations]

ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}
SAVE = "import sys; from prefect.blocks.system import Secret; Secret(value=sys.stdin.read()).save('hub-token')"


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("ThisHub", (Hub,), {"seen": [], "files": {}, "made": []})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()


def planted(folder: Path) -> list[str]:
    """Files that hold the token as it is."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [str(path) for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.timeout(1200)
def test_the_token_of_a_secret_block_is_looked_up_in_the_run(
    tmp_path: Path, elsewhere: Callable[..., dict[str, Any]], workspace: Workspace, hub: tuple[type[Hub], str]
) -> None:
    handler, endpoint = hub
    folder = workspace.folder
    evaluate = raw_run()["evaluate"] | {
        "suite": f"{folder}/suite.yaml", "perplexity_dataset": [f"{folder}/rows.jsonl"], "python": str(VLLM_PYTHON),
    }  # fmt: skip
    promote = {"alias": "production", "push": "hf:org/name", "push_secret": "hub-token"}
    run = elsewhere(evaluate=evaluate, promote=promote) | {"name": "pushed"}

    def ended(server: Server) -> dict[str, Any]:
        flow_run = server.start_run(run)
        wait_until(lambda: server.state(flow_run) in ENDED, 420)
        return server.flow_run(flow_run)

    with running_server(tmp_path, HF_ENDPOINT=endpoint) as server:
        assert not [name for name in server.environment if name == "HF_TOKEN"]
        without = ended(server)
        assert without["state_name"] == "Failed" and "the Prefect Secret block hub-token" in without["state"]["message"]
        assert handler.files == {}
        subprocess.run([sys.executable, "-c", SAVE], input=TOKEN, text=True, env=server.environment, check=True)
        done = ended(server)
        assert done["state_name"] == "Completed", done["state"]
        assert TOKEN not in json.dumps(done["parameters"])
    released = Registry(Store(workspace.store), "pushed").link("production")
    assert handler.files["model.safetensors"] == (released / "model.safetensors").read_bytes()
    assert handler.files["README.md"] == (released / "README.md").read_bytes()
    assert {authorization for _, authorization in handler.seen} == {f"Bearer {TOKEN}"}
    # In no parameter, log, report or manifest; and Prefect keeps what is in the block encrypted.
    assert planted(workspace.folder) == [] and planted(tmp_path) == []
    with sqlite3.connect(tmp_path / "prefect.db") as database:
        assert TOKEN not in "\n".join(database.iterdump())
