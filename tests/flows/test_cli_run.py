"""`mcore-flows run` on a store that has everything, and with a gate that says no."""

import pytest
import yaml

from tests.flows.workspace import raw_run
from tests.unit.flows.command_line import mcore_flows


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
    assert [line.partition(" in ")[0] for line in told] == [
        f"{name}: cached"
        for name in (
            "convert", "verify_convert", "train", "select", "export", "verify_export", "evaluate_base",
            "evaluate_tuned", "compare",
        )
    ]  # fmt: skip
    assert "Who are you?" in done.stdout and "✓ I am tiny-bot." in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        f"model:  {workspace.store}/runs/tiny/model",
        f"report: {workspace.store}/runs/tiny/report.md",
    ]


def test_a_gate_that_says_no_is_told_once(workspace, run_file, prefect_api_url):
    options = ["--set", "verify.max_relative_error=1.0e-12", "--set", "name=strict"]
    done = mcore_flows("run", run_file, *options, cwd=workspace.folder, PREFECT_API_URL=prefect_api_url)
    assert done.returncode == 3 and done.stdout == ""
    assert "convert: cached" in done.stderr and "verify_convert: started\n" in done.stderr
    assert done.stderr.count("PrecisionError") == done.stderr.count("are not the same model") == 1
    assert "Traceback" not in done.stderr and "train" not in done.stderr
    page = workspace.store / "runs" / "strict" / "report.md"
    assert f"report: {page}" in done.stderr and page.read_text().startswith("# strict: failed at verify_convert")
    shown = mcore_flows("report", "strict", cwd=workspace.folder)
    assert shown.stdout == page.read_text() and "## Verification: FAILED" in shown.stdout


def test_plan_says_what_run_then_does(workspace, run_file):
    again = mcore_flows("plan", run_file, cwd=workspace.folder)
    assert again.stdout.splitlines()[-1] == "0 of 9 stages run, 9 are reused."
    other = mcore_flows("plan", run_file, "--set", "train.lr=1e-3", cwd=workspace.folder)
    assert other.stdout.splitlines()[-1] == "6 of 9 stages run, 3 are reused."
    assert "train.lr: 0.005 -> 0.001" in other.stdout
    assert mcore_flows("artifacts", "verify", cwd=workspace.folder).returncode == 0
