"""Files of artifacts that are cut short, changed in one bit, or gone: each is seen, and the same command repairs it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from flows.pipeline import RunResult, pipeline
from mcore.artifacts import Store
from mcore.retention import artifact_folders
from tests.faults.conftest import Undisturbed
from tests.faults.disturbed import Disturbed, ended_at, told, whole
from tests.faults.server_runs import RUN

pytestmark = pytest.mark.faults

SEED = os.environ.get("MCORE_FLOWS_DAMAGE_SEED", "0")


def cut(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


Damage = Callable[[Path, random.Random], None]
DAMAGES: tuple[Damage, ...] = (cut, flip, delete)


@pytest.fixture(scope="module")
def made(workspace: Path, undisturbed: Undisturbed, prefect_api_url: str) -> Disturbed:
    """A finished run whose artifacts may be damaged."""
    shutil.copytree(undisturbed(RUN).store.root, workspace / "damaged", symlinks=True)
    return Disturbed(workspace, "damaged", RUN, api_url=prefect_api_url)


@pytest.fixture
def again(made: Disturbed, prefect_api_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RunResult]:
    """The same command again, in this process."""
    monkeypatch.chdir(made.workspace)
    return lambda: pipeline(made.run)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def all_files(store: Store) -> Iterator[tuple[str, str, Path]]:
    """Kind, key and path of every file of every artifact."""
    for folder in artifact_folders(store):
        for file in files_of(folder):
            yield folder.parent.name, folder.name, file


def test_any_damage_of_any_file_is_seen(made: Disturbed) -> None:
    draw, num_seen = random.Random(SEED), 0
    for kind, key, file in all_files(made.store):
        right = file.read_bytes()
        assert right, f"{file} is empty, so it can't be cut or changed"
        for damage in DAMAGES:
            damage(file, draw)
            status = made.store.status(kind, key)
            assert status.state == ("missing" if damage is delete and file.name == "manifest.json" else "damaged"), file
            assert status.manifest is None and made.store.find(kind, key) is None
            file.write_bytes(right)
            num_seen += 1
    assert num_seen > 100
    whole(made.store)


def repaired(made: Disturbed, result: RunResult, kinds: set[str], undisturbed: bytes) -> None:
    """What had been damaged was made again, and all is as it was."""
    kinds_made = {outcome.artifact.kind for outcome in result.outcomes if not outcome.cached}
    assert kinds <= kinds_made, [asdict(outcome) for outcome in result.outcomes]
    assert made.exported() == undisturbed
    whole(made.store)
    assert not list(made.store.root.glob(".partial/*"))
    assert ended_at(told(made.store, made.run_name)) == ("done", "")


def test_a_damaged_file_in_every_artifact_at_once(made: Disturbed, again: Callable[[], RunResult]) -> None:
    undisturbed, draw = made.exported(), random.Random(SEED)
    folders = artifact_folders(made.store)
    for number, folder in enumerate(folders):
        damage, file = DAMAGES[number % len(DAMAGES)], draw.choice(files_of(folder))
        print(f"{damage.__name__}: {file.relative_to(made.store.root)}")
        damage(file, draw)
    repaired(made, again(), {folder.parent.name for folder in folders}, undisturbed)


@pytest.mark.endurance
@pytest.mark.timeout(5400)
def test_any_damaged_file_by_itself(made: Disturbed, again: Callable[[], RunResult]) -> None:
    undisturbed, draw = made.exported(), random.Random(SEED)
    for folder in artifact_folders(made.store):
        for number in range(len(files_of(folder))):
            for damage in DAMAGES:
                file = files_of(folder)[number]  # listed again: TensorBoard's file has another name each time
                print(f"{damage.__name__}: {file.relative_to(made.store.root)}", flush=True)
                damage(file, draw)
                repaired(made, again(), {folder.parent.name}, undisturbed)
