"""`mcore-flows run` on a store that has everything, and with a gate that says no."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests.flows.workspace import raw_run
from tests.unit.flows.command_line import COMMAND, mcore_flows

pytestmark = pytest.mark.long


@pytest.fixture
def run_file(workspace, finished):
    """The finished run as a file."""
    path = workspace.folder / "cli.yaml"
    path.write_text(yaml.safe_dump(raw_run()))
    return path


def test_stages_answers_and_places_are_shown(workspace, run_file, prefect_api_url):
    done = mcore_flows("run", run_file, cwd=workspace.folder, PREFECT_API_URL=prefect_api_url)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    overlap = "2 of 2 prompts and held-out rows are in the training rows, such as who are you?"
    assert [line for line in told if " prompts " in line] == [overlap]
    told.remove(overlap)
    assert [line.partition(" in ")[0] for line in told] == [
        f"{name}: cached"
        for name in (
            "prepare", "convert", "verify_convert", "train", "select", "export", "verify_export", "evaluate_base",
            "evaluate_tuned", "compare",
        )
    ]  # fmt: skip
    assert "Who are you?" in done.stdout and "✓ I am tiny-bot." in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        f"model:  {workspace.store}/runs/tiny/model",
        f"report: {workspace.store}/runs/tiny/report.md",
    ]
    logs = {path.parent.name for path in (workspace.store / "runs" / "tiny").glob("*/stage.log")}
    assert logs == {path.name for path in (workspace.store / "runs" / "tiny").iterdir() if path.is_dir()} - {"model"}


def test_a_gate_that_says_no_is_told_once(workspace, run_file, prefect_api_url):
    options = ["--set", "verify.max_relative_error=1.0e-12", "--set", "name=strict"]
    done = mcore_flows("run", run_file, *options, cwd=workspace.folder, PREFECT_API_URL=prefect_api_url)
    assert done.returncode == 3 and done.stdout == ""
    assert "convert: cached" in done.stderr and "verify_convert: started\n" in done.stderr
    assert done.stderr.count("PrecisionError") == done.stderr.count("are not the same model") == 1
    assert "Traceback" not in done.stderr and "train:" not in done.stderr
    page = workspace.store / "runs" / "strict" / "report.md"
    assert f"report: {page}" in done.stderr and page.read_text().startswith("# strict: failed at verify_convert")
    shown = mcore_flows("report", "strict", cwd=workspace.folder)
    assert shown.stdout == page.read_text() and "## Verification: FAILED" in shown.stdout


def test_plan_says_what_run_then_does(workspace, run_file):
    again = mcore_flows("plan", run_file, cwd=workspace.folder)
    assert again.stdout.splitlines()[-1] == "0 of 10 stages run, 10 are reused."
    other = mcore_flows("plan", run_file, "--set", "train.lr=1e-3", cwd=workspace.folder)
    assert other.stdout.splitlines()[-1] == "6 of 10 stages run, 4 are reused."
    assert "train.lr: 0.005 -> 0.001" in other.stdout
    assert mcore_flows("artifacts", "verify", cwd=workspace.folder).returncode == 0


def test_ctrl_c_saves_says_so_and_the_same_command_goes_on(workspace, run_file, prefect_api_url):
    long = ["--set", "name=interrupted", "--set", "train.train_iters=100000", "--set", "train.save_steps=50000"]
    environment = os.environ | {"PREFECT_API_URL": prefect_api_url}
    log = workspace.folder / "interrupted.log"
    with log.open("w") as file:
        run = subprocess.Popen(
            [COMMAND, "run", run_file, *long],
            cwd=workspace.folder, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (started := list(workspace.store.glob(".partial/train-*/metrics.jsonl"))):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    assert run.wait(timeout=300) == 75, log.read_text()
    told = log.read_text()
    (iteration,) = re.findall(r"^StoppedError: stopped at train: iteration (\d+) is saved$", told, re.MULTILINE)
    assert "Run the same command again to go on." in told and "Traceback" not in told
    page = (workspace.store / "runs" / "interrupted" / "report.md").read_text()
    assert page.startswith("# interrupted: stopped at train\n") and f"iteration {iteration} is saved" in page
    planned = mcore_flows("plan", run_file, *long, cwd=workspace.folder)
    assert f"goes on from iteration {iteration}" in planned.stdout
    shutil.rmtree(started[0].parent)  # nobody goes on here


def test_a_reader_that_goes_away_fails_no_run(workspace, run_file, prefect_api_url):
    page = workspace.store / "runs" / "tiny" / "report.md"
    before = page.stat().st_mtime_ns
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} run {run_file} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=workspace.folder, env=os.environ | {"PREFECT_API_URL": prefect_api_url}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1
    assert page.stat().st_mtime_ns > before and page.read_text().startswith("# tiny: done\n")
