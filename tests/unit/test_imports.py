"""What may be imported where, seen from outside: the pipeline's own process stays light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "megatron", "transformers", "vllm", "peft", "safetensors", "numpy", "matplotlib"}

# fmt: off
LIGHT_MCORE = (
    "artifacts", "child", "errors", "folders", "launch", "metrics", "progress", "retention", "runs",
    "select", "supervise",
    "training_state", "wording",
    "backend.layout", "backend.rope_scaling",
    "bridge.dims", "bridge.families", "bridge.hf_config", "bridge.hf_headers", "bridge.plan", "bridge.rules",
    "bridge.spans",
    "data.rows", "data.sampling", "evaluate.compare", "evaluate.report", "sources.catalogue", "sources.resolve",
)
# fmt: on


def modules_below(folder: str) -> list[str]:
    """Dotted names of all modules of a top-level package."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def roots_loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages that are loaded after importing the modules in a fresh interpreter."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}:\n    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_configs_load_nothing_of_ours_and_nothing_heavy() -> None:
    loaded = roots_loaded_by(modules_below("configs"))
    assert not loaded & (HEAVY | {"prefect", "mcore", "tasks", "flows"})


def test_light_modules_of_the_engine_room_load_nothing_heavy() -> None:
    families = [name for name in modules_below("mcore/bridge/families") if name.count(".") == 3]
    assert len(families) >= 3
    loaded = roots_loaded_by([*(f"mcore.{name}" for name in LIGHT_MCORE), *families])
    assert not loaded & (HEAVY | {"prefect", "tasks", "flows"})


def test_tasks_and_flows_load_nothing_heavy() -> None:
    modules = [*modules_below("tasks"), *modules_below("flows")]
    assert {"flows.cli", "flows.pipeline", "tasks.preflight", "tasks.report", "tasks.graph"} <= set(modules)
    loaded = roots_loaded_by(modules)
    assert "prefect" in loaded  # or this test would look at nothing
    assert not loaded & HEAVY


@pytest.mark.parametrize("module", ["flows.cli", "flows.plan", "flows.cli_runs", "tasks.preflight", "tasks.report"])
def test_the_command_line_starts_without_prefect(module: str) -> None:
    assert not roots_loaded_by([module]) & (HEAVY | {"prefect"})


def test_every_top_level_folder_is_a_package() -> None:
    for folder in ("configs", "flows", "mcore", "tasks"):
        assert (ROOT / folder / "__init__.py").is_file()
    for package in (ROOT / "mcore").rglob("*.py"):
        assert (package.parent / "__init__.py").is_file()


def test_an_export_does_not_wait_for_megatron() -> None:
    assert "megatron" not in roots_loaded_by(["mcore.bridge.export"])
