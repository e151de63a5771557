"""Conversations with a small server on the loopback, and servers that are started and end; vLLM is in tests/vllm."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.conversation import Conversation, served_models
from flows.served_model import OPENER, served
from mcore.errors import ConfigError, InfrastructureError
from tests.unit.flows.command_line import COMMAND, mcore_flows

SERVER = Path(__file__).with_name("small_server.py")


class Handler(BaseHTTPRequestHandler):
    """Repeats the last question word by word, and says how many messages it was given."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(json.dumps({"data": [{"id": "one"}, {"id": "two"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        last = body["messages"][-1]["content"]
        if last == "refuse":
            self._send(json.dumps({"error": {"message": "too long"}}), 400)
            return
        pieces = [f"{word} " for word in last.split()] + [str(len(body["messages"]))]
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.bodies = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_turns_are_kept_and_the_system_message_goes_before_them(server):
    talk = Conversation(address(server), "one", system="Be short.")
    assert list(talk.ask("Hi there")) == ["Hi ", "there ", "2"]
    assert "".join(talk.ask("Bye")) == "Bye 4"
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hi there 2"},
        {"role": "user", "content": "Bye"},
    ]
    talk.reset()
    assert "".join(talk.ask("Again")) == "Again 2"


def test_a_question_that_is_refused_is_no_part_of_the_conversation(server):
    talk = Conversation(address(server), "one")
    with pytest.raises(ConfigError, match="400: too long"):
        list(talk.ask("refuse"))
    assert talk.messages == []


def test_an_answer_that_is_broken_off_is_what_was_said(server):
    talk = Conversation(address(server), "one")
    pieces = talk.ask("a b c")
    assert next(pieces) == "a "
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "a "}


def test_the_command_talks_to_a_server_that_runs(server, tmp_path):
    lines = "Hello you\n\n/reset\nBye\n/quit\nnever asked\n"
    words = [str(COMMAND), "chat", "--url", f"{address(server)}/v1/"]
    done = subprocess.run(words, cwd=tmp_path, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Hello you 1", "Bye 1"]
    assert [body["model"] for body in server.bodies] == ["one", "one"]
    done = mcore_flows("chat", "three", "--url", address(server), cwd=tmp_path)
    assert done.returncode == 2
    assert "one of one, two" in done.stderr


def test_no_server_is_told(tmp_path):
    with pytest.raises(InfrastructureError, match="can't be reached"):
        served_models("http://127.0.0.1:9", None)


def test_a_server_is_up_for_the_block_and_gone_behind_it_with_its_children(tmp_path):
    marks = tmp_path / "pids"
    with served([sys.executable, str(SERVER), str(marks)], start_s=30) as (url, key):
        assert url.startswith("http://127.0.0.1:")
        assert json.load(OPENER.open(f"{url}/key"))["key"] == key
        pids = [int(line) for line in marks.read_text().split()]
        assert len(pids) == 2
    assert not [pid for pid in pids if _lives(pid)]
    with pytest.raises(RuntimeError, match="on the way"), served([sys.executable, str(SERVER), str(marks)], start_s=30):
        pids = [int(line) for line in marks.read_text().split()]
        raise RuntimeError("on the way")
    assert not [pid for pid in pids if _lives(pid)]


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such weights')"]
    with pytest.raises(InfrastructureError, match="no such weights"), served(command, start_s=30):
        pass
    with pytest.raises(ConfigError, match="vLLM can't be started"), served([str(tmp_path / "none")], start_s=30):
        pass


def _lives(pid):
    for _ in range(50):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True
