"""`prefect.yaml` says what the run files say, and fits any machine."""

from pathlib import Path

import pytest
import yaml
from prefect.utilities.importtools import import_object

from configs.schema.load import load_run
from configs.schema.run import RunConfig
from flows.checkout import enter_checkout

CHECKOUT = Path(__file__).parents[2]
PROJECT = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in PROJECT["deployments"]}
DEMO = CHECKOUT / "configs" / "runs" / "smollm2_135m_cpu.yaml"


@pytest.mark.parametrize("name", ["pipeline", "nightly"])
def test_parameters_are_the_demo_run(name):
    run = DEPLOYMENTS[name]["parameters"]["run"]
    assert run == yaml.safe_load(DEMO.read_text())
    assert RunConfig.model_validate(run) == load_run(DEMO)


@pytest.mark.parametrize("name", ["pipeline", "nightly"])
def test_the_entrypoint_is_the_pipeline(name, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    assert import_object(DEPLOYMENTS[name]["entrypoint"]).name == "pipeline"
    assert DEPLOYMENTS[name]["work_pool"]["name"] == PROJECT["name"]


def test_nightly_has_a_schedule_in_a_time_zone():
    (schedule,) = DEPLOYMENTS["nightly"]["schedules"]
    assert schedule["cron"] == "0 3 * * *" and schedule["timezone"] == "Etc/UTC"
    assert "schedules" not in DEPLOYMENTS["pipeline"]


def test_a_run_works_in_the_checkout_of_its_worker(monkeypatch, tmp_path):
    assert PROJECT["pull"] == [{"flows.checkout.enter_checkout": {}}]
    assert "pull" not in DEPLOYMENTS["pipeline"] and "pull" not in DEPLOYMENTS["nightly"]
    monkeypatch.chdir(tmp_path)
    assert enter_checkout() == {"directory": str(CHECKOUT)}
    assert Path.cwd() == CHECKOUT
