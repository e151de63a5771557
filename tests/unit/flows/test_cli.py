"""The command line as people meet it: exit status, messages, and what it writes."""

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.cli_artifacts import _by_time
from flows.cli_stages import _make_base
from mcore.artifacts import Manifest, Store
from tests.unit.flows.command_line import mcore_flows
from tests.unit.tasks.model_folders import listing, write_workspace


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_workspace(tmp_path / "work")
    (tmp_path / "home").mkdir()
    return tmp_path / "work"


def change_run(here: Path, **changes: Any) -> None:
    run = yaml.safe_load((here / "run.yaml").read_text())
    for name, value in changes.items():
        group, _, field = name.partition("__")
        run.setdefault(group, {})[field] = value
    (here / "run.yaml").write_text(yaml.safe_dump(run))


def change_model(here: Path, **changes: Any) -> None:
    path = here / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append_row(here: Path, text: str) -> None:
    with (here / "rows.jsonl").open("a") as file:
        file.write(text)


# Every kind of bad input that there is, what makes it, and what the message must say.
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown key": (
        lambda here: change_run(here, train__global_batchsize=4),
        "train.global_batchsize: unknown key; did you mean train.global_batch_size?",
    ),
    "wrong type": (
        lambda here: change_run(here, train__lr="fast"),
        "train.lr: input should be a valid number, unable to parse string as a number, found 'fast'",
    ),
    "missing file": (
        lambda here: (here / "val.jsonl").unlink(),
        "val.jsonl: expected a jsonl file, found No such file or directory",
    ),
    "TP and KV heads": (
        lambda here: change_run(here, train__tensor_model_parallel_size=4, launch__nproc_per_node=4),
        "num_key_value_heads: expected a multiple of tensor_model_parallel_size (4), found 2",
    ),
    "batch sizes": (
        lambda here: change_run(here, train__global_batch_size=6, train__micro_batch_size=4),
        "train.global_batch_size (6) must be a multiple of micro_batch_size x data parallel size (4 x 1 = 4)",
    ),
    "unsupported architecture": (
        lambda here: change_model(here, architectures=["MambaForCausalLM"]),
        "found 'MambaForCausalLM'. Choose a model of a supported architecture",
    ),
    "vocabulary mismatch": (
        lambda here: change_model(here, vocab_size=29),
        "expected token ids below vocab_size 29 (config.json), found 1 beyond it, up to 29",
    ),
    "empty row": (lambda here: append_row(here, "\n"), "rows.jsonl:21: expected one JSON object, found an empty line"),
    "malformed row": (
        lambda here: append_row(here, '{"messages": [{"role": "user", "content": "Hello?"}]}\n'),
        "rows.jsonl:21: the last message must be the assistant's",
    ),
}


def refused(here: Path, *arguments: str) -> str:
    """The message of a command that must refuse its input without writing anything."""
    before = listing(here.parent)
    done = mcore_flows(*arguments, cwd=here, home=here.parent / "home")
    assert listing(here.parent) == before, "something was written"
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_is_refused_before_anything_starts(here: Path, name: str) -> None:
    make_bad, expected = BAD[name]
    make_bad(here)
    assert expected in refused(here, "run", "run.yaml")


def test_all_bad_input_is_listed_at_once(here: Path) -> None:
    for make_bad, _ in BAD.values():
        make_bad(here)
    # What a layout does to a model can only be told where its architecture is supported.
    apart = {"TP and KV heads"}
    for command in ("run", "plan"):
        message = refused(here, command, "run.yaml")
        for name, (_, expected) in BAD.items():
            assert message.count(expected.replace(":21: the last", ":22: the last")) == (name not in apart), message
    run = yaml.safe_load((here / "run.yaml").read_text())
    del run["train"]["global_batchsize"]
    (here / "run.yaml").write_text(yaml.safe_dump(run))
    change_model(here, architectures=["LlamaForCausalLM"])
    message = refused(here, "run", "run.yaml", "--set", "train.lr=1e-4")
    for name in ("TP and KV heads", "batch sizes", "vocabulary mismatch", "empty row", "missing file"):
        assert BAD[name][1] in message, message


def test_a_run_file_that_is_none_is_refused(here: Path) -> None:
    assert "none.yaml: can't be read: No such file" in refused(here, "run", "none.yaml")
    assert "--set lr: must look like train.lr=1.0e-4" in refused(here, "plan", "run.yaml", "--set", "lr")
    (here / "run.yaml").write_text("[1, 2")
    assert "run.yaml: is no YAML" in refused(here, "plan", "run.yaml")


def test_bad_options_are_refused(here: Path) -> None:
    assert "Usage: mcore-flows run" in refused(here, "run", "run.yaml", "--fast")
    runner = CliRunner()
    for arguments in (
        ["run"],
        ["plan", "run.yaml", "two.yaml"],
        ["launch"],
        ["convert", "--model", "model"],
        ["convert", "--model", "model", "--output", "out", "--make-vocab-size-divisible-by", "0"],
        ["export", "--checkpoint", "c", "--output", "out", "--torch-dtype", "int8"],
        ["evaluate", "--model", "model", "--suite", "suite.yaml", "--max-tokens", "many"],
        ["artifacts", "gather"],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and "Usage: " in done.stderr, arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "--model", "model", "--output", "suite.yaml"], "the output folder is in the way"),
        (["convert", "--model", "./none", "--output", "out"], "./none: expected a folder"),
        (["convert", "--model", "smollm3", "--output", "out"], "a name of the catalogue (smollm2-135m-instruct)"),
        (["verify", "--hf", "model", "--mcore", "model", "--output", "model"], "pass --overwrite to replace it"),
        (["evaluate", "--model", "model", "--suite", "suite.yaml", "--python", "no/python"], "no/python"),
        (["train", "run.yaml", "--set", "train.lr=0"], "train.lr: input should be greater than 0"),
        (["train", "run.yaml", "--set", "data.dataset=[none.jsonl]"], "none.jsonl: expected a jsonl file"),
        (["plan", "run.yaml", "--store", "rows.jsonl"], "rows.jsonl: expected a folder, found a file"),
        (["report", "none"], "expected a run that was started, found no such file"),
        (["artifacts", "show", "train/123"], "train/123: expected one artifact"),
        (["artifacts", "verify", "train/123"], "train/123: expected one artifact"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_commands_refuse_too(here: Path, arguments: list[str], expected: str) -> None:
    assert expected in refused(here, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "--checkpoint", "nope", "--output", "out"], ["--checkpoint", "nope"]),
        (
            ["verify", "--hf", "nope", "--mcore", "never"],
            ["--hf: no such file or folder: nope", "--mcore: no such file or folder: never"],
        ),
        (
            ["evaluate", "--model", "./nope", "--suite", "never"],
            ["./nope: expected a folder", "--suite: no such file or folder: never"],
        ),
        (["evaluate", "--model", "model", "--suite", "never"], ["--suite: no such file or folder: never"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_all_that_is_missing_is_named_at_once(here: Path, arguments: list[str], expected: list[str]) -> None:
    message = refused(here, *arguments)
    assert all(part in message for part in expected), message


def test_an_earlier_proof_is_not_shown_as_the_one_that_was_refused(here: Path) -> None:
    (here / "proof").mkdir()
    (here / "proof" / "report.md").write_text("# Verification: passed\n")
    assert "--hf: no such" in refused(here, "verify", "--hf", "nope", "--mcore", "never", "--output", "proof",
                                      "--overwrite")  # fmt: skip


@pytest.mark.parametrize("recorded", ["hf:other/name@" + "1" * 40, None])
def test_a_fetched_folder_is_used_for_no_other_model_of_its_name(here: Path, recorded: str | None) -> None:
    folder = here / "models" / "name"
    (here / "models").mkdir()
    (here / "model").rename(folder)
    if recorded:
        (folder / "metrics.json").write_text(json.dumps({"source": recorded}))
    source = "hf:org/name@" + "0" * 40
    message = refused(here, "convert", "--model", source, "--output", "out")
    assert source in message and (recorded or "no source in models/name/metrics.json") in message
    (folder / "metrics.json").write_text(json.dumps({"source": source}))
    done = mcore_flows("evaluate", "--model", source, "--suite", "suite.yaml", "--python", "no/python", cwd=here)
    assert done.returncode == 2 and "using models/name" in done.stderr and "no/python" in done.stderr


def test_a_base_is_used_only_if_it_was_made_of_the_runs_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "run.yaml", "--output", "out"]
    (here / "out-base").mkdir()
    assert "out-base: source: expected files " in refused(here, *arguments)
    (here / "out-base").rmdir()
    monkeypatch.chdir(here)
    _make_base(Path("out-base"), "model", 128)
    before = listing(here / "out-base")
    assert before
    _make_base(Path("out-base"), "./model", 128)
    assert listing(here / "out-base") == before
    message = refused(here, *arguments, "--set", "convert.make_vocab_size_divisible_by=64")
    assert "make_vocab_size_divisible_by: expected 64, found 128" in message and "source" not in message
    change_model(here, rms_norm_eps=1e-6)
    message = refused(here, *arguments)
    assert "out-base: source: expected files " in message and "--base out-base" in message


def test_a_name_of_the_catalogue_needs_no_run(here: Path) -> None:
    (here / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    assert "the output folder is in the way" in refused(here, "fetch", "smollm2-135m-instruct")
    assert "a local folder needs no fetch" in refused(here, "fetch", "model")


def test_plan_tells_what_would_run_and_makes_nothing(here: Path) -> None:
    before = listing(here.parent)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = mcore_flows("plan", "run.yaml", cwd=here, home=here.parent / "home")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert lines[0] == ["stage", "does", "why"] and ["train", "RUN", "new run"] in lines
    assert done.stdout.splitlines()[-1] == "10 of 10 stages run, 0 are reused."
    assert re.search(r"^stage +weights +gradients .*\n0 +[0-9.]+ ", done.stdout, re.MULTILINE)
    assert re.search(r"Training is estimated to take \d+\.\d GiB a process", done.stdout)
    assert listing(here.parent) == before
    # Two seconds on an idle machine; of the processor's time, so that a busy machine does not fail it.
    assert after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime < 2.0


def test_help_reads_well() -> None:
    runner = CliRunner(env={"COLUMNS": "100"})
    page = runner.invoke(app, ["--help"]).stdout
    for command in ("run", "plan", "report", "artifacts", "fetch", "convert", "export", "verify", "train", "evaluate"):
        text = runner.invoke(app, [command, "--help"])
        assert text.exit_code == 0 and f" {command} " in text.stdout and command in page
    assert "A whole run" in page and "Single stages by hand" in page and "3 a gate said no" in page
    assert "with @revision" in runner.invoke(app, ["convert", "--help"]).stdout  # brackets would be taken for markup


def put(store: Store, kind: str, key: str, inputs: dict[str, str] | None = None, **contents: str) -> None:
    folder = store.partial(kind, key)
    folder.mkdir(parents=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    store.commit(
        kind,
        key,
        inputs=inputs or {},
        input_content={},
        ingredients={},
        metrics={"loss": 1.5},
        versions={},
        duration_s=2.0,
    )


def test_artifacts_are_listed_shown_and_checked(here: Path) -> None:
    assert "0 artifacts" in mcore_flows("artifacts", "list", cwd=here).stdout
    store = Store(here / "store")
    put(store, "train", "a" * 20, weights="x" * 1500)
    put(store, "train", "ab" * 10, weights="y")
    put(store, "export", "c" * 20, weights="z")
    listed = mcore_flows("artifacts", "list", "--kind", "train", cwd=here).stdout
    assert f"train/{'a' * 20}" in listed and "1.5 kB" in listed and "2 artifacts" in listed and "export" not in listed
    shown = json.loads(mcore_flows("artifacts", "show", "export/c", cwd=here).stdout)
    assert shown["path"] == str(store.path("export", "c" * 20)) and shown["metrics"] == {"loss": 1.5}
    ambiguous = mcore_flows("artifacts", "show", "train/a", cwd=here)
    assert ambiguous.returncode == 2 and f"found train/{'a' * 20}, train/{'ab' * 10}" in ambiguous.stderr
    assert "3 artifacts are whole" in mcore_flows("artifacts", "verify", cwd=here).stdout


def test_one_artifact_is_one_and_all_are_listed_as_they_were_made(here: Path) -> None:
    store = Store(here / "store")
    put(store, "verify", "0" * 20, weights="x")
    assert "1 artifact is whole" in mcore_flows("artifacts", "verify", cwd=here).stdout
    put(store, "fetch", "f" * 20, weights="x")
    put(store, "convert", "c" * 20, weights="x")
    listed = mcore_flows("artifacts", "list", cwd=here).stdout.splitlines()
    assert [line.partition("/")[0] for line in listed[1:-1]] == ["verify", "fetch", "convert"]
    assert listed[-1].startswith("3 artifacts, ")


def test_artifacts_of_one_moment_are_listed_by_lineage(here: Path) -> None:
    made = {"c": {"in": "b/k"}, "b": {"in": "d/k"}, "a": {"in": "c/k"}, "d": {}}
    manifests = [
        Manifest(kind, "k", {}, inputs, {}, {}, {}, {}, "2026-11-24T07:22:00+00:00", 1.0)
        for kind, inputs in made.items()
    ]
    assert [manifest.kind for manifest in _by_time(manifests)] == ["d", "b", "c", "a"]


def test_an_iteration_that_is_not_there_is_wrong_input(here: Path) -> None:
    for iteration in (5, 10):
        (here / "trained" / f"iter_{iteration:07d}").mkdir(parents=True)
    for command in (
        ["export", "--checkpoint", "trained", "--output", "out"],
        ["verify", "--hf", "model", "--mcore", "trained"],
    ):
        assert "--iteration of trained: expected one of 5, 10, found 7" in refused(here, *command, "--iteration", "7")


def test_damage_that_only_a_full_read_finds_is_found(here: Path) -> None:
    store = Store(here / "store")
    put(store, "train", "a" * 20, weights="x" * 1500)
    put(store, "export", "c" * 20, weights="z")
    weights = store.path("train", "a" * 20) / "weights"
    # As a disk that rots would: other content under the same size and times, so that the cache believes it.
    stat = weights.stat()
    weights.write_text("x" * 1499 + "y")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    known = json.loads((here / "store" / ".digests.json").read_text())
    known[str(weights)][0] = [weights.stat().st_size, weights.stat().st_ino, weights.stat().st_mtime_ns,
                              weights.stat().st_ctime_ns]  # fmt: skip
    (here / "store" / ".digests.json").write_text(json.dumps(known))
    (store.path("export", "c" * 20) / "manifest.json").unlink()
    assert Store(here / "store").status("train", "a" * 20).state == "valid"
    done = mcore_flows("artifacts", "verify", cwd=here)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"train/{'a' * 20}: expected a whole artifact, found weights: content changed" in done.stderr
    assert f"export/{'c' * 20}: expected a whole artifact, found manifest.json is missing" in done.stderr
    assert Store(here / "store").status("train", "a" * 20).state == "damaged"  # and it is remembered
    assert mcore_flows("artifacts", "verify", "train", cwd=here).returncode == 1


def test_the_report_of_a_run_is_shown(here: Path) -> None:
    page = here / "store" / "runs" / "small" / "report.md"
    page.parent.mkdir(parents=True)
    page.write_text("# small: done\n")
    done = mcore_flows("report", "small", cwd=here)
    assert (done.returncode, done.stdout) == (0, "# small: done\n")
    other = mcore_flows("report", "large", cwd=here)
    assert other.returncode == 2 and "expected one of small" in other.stderr
    assert mcore_flows("report", "small", "--store", "elsewhere", cwd=here).returncode == 2
