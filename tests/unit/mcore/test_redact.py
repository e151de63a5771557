"""What the environment keeps secret is in nothing that a stage leaves behind, also if its processes print it."""

import os
import sys
from pathlib import Path

import pytest

from mcore import launch
from mcore.errors import LaunchError, PipelineError
from mcore.redact import redact_file, redacted, secrets_of, without_prefect_secrets

SECRET = {
    "HF_TOKEN": "hf_planted0123456789",
    "MODELSCOPE_API_TOKEN": "ms-planted-0123",
    "PREFECT_API_KEY": "pnu_planted0123",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+0123",
    "HTTPS_PROXY": "http://me:planted-proxy@127.0.0.1:9",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://me:planted-db@127.0.0.1/prefect",
    "WANDB_API_KEY": "planted-wandb",
    "MY_PASSWORD": "planted-password",
}
VALUES = {name: value.partition("//")[2].partition("@")[0].partition(":")[2] or value for name, value in SECRET.items()}
OF_A_BLOCK = "hub_planted0123"
"""A secret that only the child is given."""
PLAIN = {
    "TOKENIZERS_PARALLELISM": "false-or-so",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "PWD": "/somewhere/deep",
    "HF_HOME": "/somewhere/cache",
    "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    "MAX_TOKENS": "1234567890",
    "HF_TOKEN_PATH": "/somewhere/token",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRET | PLAIN).items():
        monkeypatch.setenv(name, value)


def test_secrets_are_told_from_settings_by_their_names() -> None:
    assert set(secrets_of(SECRET)) == set(VALUES.values())
    assert secrets_of(PLAIN) == []


def test_a_text_keeps_its_length_and_all_else() -> None:
    text = " ".join(f"{name}={value}" for name, value in (SECRET | PLAIN).items())
    clean = redacted(text)
    assert len(clean) == len(text) and not [value for value in VALUES.values() if value in clean]
    assert all(f"{name}={value}" in clean for name, value in PLAIN.items())


def test_a_secret_within_a_longer_one_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONG_TOKEN", f"{SECRET['HF_TOKEN']}-and-more")
    assert redacted(f"x{SECRET['HF_TOKEN']}-and-more") == "x" + "*" * (len(SECRET["HF_TOKEN"]) + 9)


def test_a_file_is_overwritten_in_place_from_the_offset_on(tmp_path: Path) -> None:
    file = tmp_path / "log"
    head, rest = SECRET["HF_TOKEN"].encode(), b"\xff\0" + 2 * SECRET["HF_TOKEN"].encode() + b"\n"
    file.write_bytes(head + rest)
    inode = file.stat().st_ino
    redact_file(file, len(head))
    assert file.read_bytes() == head + b"\xff\0" + b"*" * (2 * len(head)) + b"\n" and file.stat().st_ino == inode
    (tmp_path / "empty").touch()
    redact_file(tmp_path / "empty")


def test_children_know_nothing_of_prefects_secrets() -> None:
    given = without_prefect_secrets(os.environ)
    assert "PREFECT_API_KEY" not in given and "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in given
    assert given["HF_TOKEN"] == SECRET["HF_TOKEN"]  # the hubs' clients need theirs
    assert given["PREFECT_API_URL"] == PLAIN["PREFECT_API_URL"]


CHATTY = """
import os, sys, time
from mcore.child import run_as_child
from mcore.errors import ConversionError
def main():
    print(dict(os.environ), flush=True)
    sys.stderr.write("Authorization: Bearer " + os.environ["HF_TOKEN"])
    sys.stderr.flush()
    time.sleep(0.5)
    {then}
run_as_child(main)
"""


@pytest.mark.parametrize(
    "then",
    [
        "pass",
        "sys.exit(4)",
        "raise ConversionError('no: ' + os.environ['HF_TOKEN'], [os.environ['HTTPS_PROXY']])",
        "raise ValueError(os.environ['MODELSCOPE_API_TOKEN'])",
        "os.kill(os.getpid(), 9)",
        "os.kill(os.getppid(), 9); time.sleep(60)",  # its supervisor
    ],
)
def test_what_a_child_prints_of_them_is_kept_nowhere(tmp_path: Path, then: str) -> None:
    lines: list[str] = []
    error: PipelineError | None = None
    try:
        launch.run(
            [sys.executable, "-c", CHATTY.format(then=then)],
            log_path=tmp_path / "stage.log",
            error_file=tmp_path / "error.json",
            on_line=lines.append,
            env={"HUB_TOKEN": OF_A_BLOCK},
        )
    except PipelineError as exc:
        error = exc
    assert (error is None) == (then == "pass")
    written = {path.name: path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert "Authorization: Bearer ****" in written["stage.log"] and "PREFECT_API_KEY" not in written["stage.log"]
    assert any("Authorization: Bearer ****" in line for line in lines)
    told = [str(error), getattr(error, "tail", ""), "" if error is None else error.to_json()]
    # The child's own program is in the log's first line and in the record; it holds names only.
    everything = "\n".join([*written.values(), *lines, *told])
    assert not [name for name, value in VALUES.items() if value in everything]
    assert OF_A_BLOCK not in everything and "'HUB_TOKEN': '****" in written["stage.log"]
    if "sys.exit" in then:
        assert isinstance(error, LaunchError) and "****" in error.tail
