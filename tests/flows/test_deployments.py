"""`prefect.yaml` says what the run files say, and fits any machine."""

from pathlib import Path

import pytest
import yaml
from prefect.utilities.importtools import import_object

from configs.schema.run import RunConfig
from flows.automations import TAG
from flows.checkout import enter_checkout
from flows.dataset_events import UPDATED

CHECKOUT = Path(__file__).parents[2]
PROJECT = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in PROJECT["deployments"]}
DEMO = CHECKOUT / "configs" / "runs" / "smollm2_135m_cpu.yaml"


FLOWS = {
    "pipeline": "pipeline",
    "convert": "convert-only",
    "train": "train-only",
    "evaluate": "evaluate-only",
    "nightly": "retrain",
    "dataset-updated": "retrain",
    "collect-garbage": "collect-garbage",
}
UNATTENDED = {"nightly", "dataset-updated"}


def test_every_deployment_is_known_here():
    assert DEPLOYMENTS.keys() == FLOWS.keys()


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "collect-garbage"])
def test_parameters_are_the_demo_run(name):
    run = DEPLOYMENTS[name]["parameters"]["run"]
    expected = yaml.safe_load(DEMO.read_text())
    # What nobody looks at has a name, and so a last success, of its own.
    expected["name"] = "smollm2_135m_nightly" if name in UNATTENDED else expected["name"]
    assert run == expected
    RunConfig.model_validate(run)


@pytest.mark.parametrize("name", FLOWS)
def test_the_entrypoint_is_the_flow_and_takes_the_parameters(name, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    flow = import_object(DEPLOYMENTS[name]["entrypoint"])
    assert flow.name == FLOWS[name]
    flow.validate_parameters(DEPLOYMENTS[name]["parameters"])
    assert DEPLOYMENTS[name]["work_pool"]["name"] == PROJECT["name"]
    assert TAG in DEPLOYMENTS[name]["tags"]  # by which automations know our runs


def test_schedules_are_in_a_time_zone():
    schedules = {name: one["schedules"] for name, one in DEPLOYMENTS.items() if "schedules" in one}
    assert {name: [one["cron"] for one in some] for name, some in schedules.items()} == {
        "nightly": ["0 3 * * *"],
        "collect-garbage": ["0 5 * * 0"],
    }
    assert {one["timezone"] for some in schedules.values() for one in some} == {"Etc/UTC"}


def test_nothing_is_deleted_unless_somebody_says_so():
    assert DEPLOYMENTS["collect-garbage"]["parameters"]["delete"] is False


def test_the_trigger_waits_for_the_event_that_the_command_sends():
    (trigger,) = DEPLOYMENTS["dataset-updated"]["triggers"]
    assert trigger["expect"] == [UPDATED]


def test_a_run_works_in_the_checkout_of_its_worker(monkeypatch, tmp_path):
    assert PROJECT["pull"] == [{"flows.checkout.enter_checkout": {}}]
    assert not any("pull" in deployment for deployment in DEPLOYMENTS.values())
    monkeypatch.chdir(tmp_path)
    assert enter_checkout() == {"directory": str(CHECKOUT)}
    assert Path.cwd() == CHECKOUT
