"""The artifact store: what is there is whole, what was touched is noticed, and no crash leaves half of anything."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore import artifacts
from mcore.artifacts import (
    MANIFEST,
    ArtifactRef,
    DigestCache,
    Store,
    digest_of,
    file_digest,
    folder_digest,
    publish_link,
)
from mcore.errors import ArtifactError

KIND, INGREDIENTS = "convert", {"stage": "convert", "version": 1, "config": {"a": 1.5, "b": ["ü", None]}}
KEY = digest_of(INGREDIENTS)
FILES = {"weights.bin": b"w" * 3000, "sub/deep/tokenizer.json": b"{}", "empty": b""}


def write_partial(store: Store, files: dict[str, bytes] = FILES, key: str = KEY) -> Path:
    partial = store.partial(KIND, key)
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    return partial


def commit(store: Store, key: str = KEY) -> ArtifactRef:
    return store.commit(
        KIND,
        key,
        inputs={"hf": "fetch/abc"},
        input_content={"hf": "one"},
        ingredients=INGREDIENTS,
        metrics={"num_tensors": 3, "loss": float("nan"), "per_layer": {10: 1.0, 9: 2.0}},
        versions={"torch": "2.13.0"},
        duration_s=1.23456,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def made(store: Store) -> Store:
    write_partial(store)
    commit(store)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_keys_depend_on_content_not_on_order() -> None:
    assert digest_of({"a": 1, "b": [2.0, None]}) == digest_of({"b": [2.0, None], "a": 1})
    assert len({digest_of({"a": value}) for value in (1, 1.5, "1", None, True, [], {})}) == 7
    assert digest_of({"a": "\ud800"}) != digest_of({"a": "?"})  # a lone surrogate of a path that is no UTF-8


def test_looking_at_an_absent_store_writes_nothing(store: Store) -> None:
    assert store.status(KIND, KEY).state == "missing"
    assert store.find(KIND, KEY) is None and not list(store.manifests())
    store.digests.save()
    assert not store.root.exists()


def test_a_commit_makes_a_valid_artifact_and_leaves_no_partial(made: Store) -> None:
    status = made.status(KIND, KEY)
    assert status.state == "valid" and status.manifest
    assert dict(status.manifest.inputs) == {"hf": "fetch/abc"} and status.manifest.ingredients == INGREDIENTS
    assert status.manifest.duration_s == 1.235 and status.manifest.metrics["per_layer"] == {"10": 1.0, "9": 2.0}
    folder = made.path(KIND, KEY)
    found = contents(folder)
    assert found.pop(MANIFEST) and found == FILES
    assert set(status.manifest.files) == set(FILES)
    assert not list((made.root / ".partial").iterdir())
    ref = made.find(KIND, KEY)
    assert ref and (ref.kind, ref.key, ref.path) == (KIND, KEY, str(folder))
    assert [manifest.key for manifest in made.manifests()] == [KEY]


def test_an_old_manifest_is_replaced(store: Store) -> None:
    (write_partial(store) / MANIFEST).write_text("stale")
    commit(store)
    assert set(contents(store.path(KIND, KEY))) == {*FILES, MANIFEST}
    assert store.status(KIND, KEY).state == "valid"


def test_content_is_what_an_artifact_is_not_how_it_was_made(store: Store) -> None:
    write_partial(store, FILES | {"metrics.json": b"1 s", "tensorboard/events": b"monday"})
    first = commit(store)
    write_partial(store, FILES | {"metrics.json": b"2 s", "tensorboard/events": b"friday"})
    assert commit(store).content == first.content
    name = sorted(FILES)[0]
    write_partial(store, FILES | {name: FILES[name] + b"!"})
    assert commit(store).content != first.content


def test_an_input_that_came_out_otherwise_is_told(store: Store) -> None:
    write_partial(store)
    commit(store)
    manifest = store.status(KIND, KEY).manifest
    assert manifest is not None
    assert manifest.outdated_inputs({"hf": "one"}) == []
    assert manifest.outdated_inputs({"hf": "other", "proof": "any"}) == ["hf"]


def test_nothing_and_links_cannot_be_committed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="found none"):
        commit(store)
    partial = write_partial(store)
    (tmp_path / "outside").write_text("x")
    (partial / "link").symlink_to(tmp_path / "outside")
    (partial / "sub" / "dangling").symlink_to("nowhere")
    (partial / "folder").symlink_to(tmp_path)
    with pytest.raises(ArtifactError) as error:
        commit(store)
    assert {Path(problem.subject).name for problem in error.value.problems} == {"link", "dangling", "folder"}
    assert store.status(KIND, KEY).state == "missing" and partial.exists()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def keep_times(path: Path, change: Callable[[Path], None]) -> None:
    """Change a file and set its modification time back: what an editor or rsync may do."""
    stat = path.stat()
    change(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda folder: flip(folder / "weights.bin", 1500), "weights.bin: content changed"),
    "a flipped bit, old time": (
        lambda folder: keep_times(folder / "weights.bin", lambda path: flip(path, 0)),
        "weights.bin: content changed",
    ),
    "a cut file": (lambda folder: os.truncate(folder / "weights.bin", 10), "weights.bin: 10 bytes, expected 3000"),
    "a longer file": (lambda folder: (folder / "empty").write_text("x"), "empty: 1 bytes, expected 0"),
    "a deleted file": (lambda folder: (folder / "sub/deep/tokenizer.json").unlink(), "file is missing"),
    "a file that is a folder": (lambda folder: ((folder / "empty").unlink(), (folder / "empty").mkdir()), "empty: "),
    "a file that is a link": (
        lambda folder: ((folder / "empty").rename(folder / "x"), (folder / "empty").symlink_to("x")),
        "empty: replaced by a link",
    ),
    "a cut manifest": (lambda folder: os.truncate(folder / MANIFEST, 100), "manifest.json: can't be read"),
    "an empty manifest": (lambda folder: os.truncate(folder / MANIFEST, 0), "manifest.json: can't be read"),
    "bytes for a manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json: can't be"),
    "a list for a manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json: can't be read"),
    "another's manifest": (
        lambda folder: (folder / MANIFEST).write_text('{"sha256": "0", "kind": "x"}'),
        "manifest.json: can't be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda name: name.replace(" ", "-"))
def test_damage_is_found_named_and_repaired(made: Store, damage: str) -> None:
    change, why = DAMAGES[damage]
    change(made.path(KIND, KEY))
    for store in (made, Store(made.root)):  # with the digests in memory, and with those on disk
        status = store.status(KIND, KEY)
        assert status.state == "damaged" and why in status.why, status
        assert store.find(KIND, KEY) is None
    write_partial(made)
    commit(made)
    assert Store(made.root).status(KIND, KEY, fresh=True).state == "valid"
    assert not list((made.root / ".partial").iterdir())


def test_every_flipped_byte_of_the_manifest_is_found(made: Store) -> None:
    path = made.path(KIND, KEY) / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert made.status(KIND, KEY).state == "damaged", content[position : position + 20]


def test_a_missing_manifest_means_no_artifact(made: Store) -> None:
    (made.path(KIND, KEY) / MANIFEST).unlink()
    assert made.status(KIND, KEY).state == "missing" and "manifest.json is missing" in made.status(KIND, KEY).why
    assert not list(made.manifests())


def test_a_manifest_in_the_wrong_place_is_not_believed(made: Store) -> None:
    moved = made.path(KIND, "0" * 20)
    made.path(KIND, KEY).rename(moved)
    assert made.status(KIND, "0" * 20).state == "damaged"
    assert not list(made.manifests())


def test_what_is_still_being_made_is_not_listed(store: Store) -> None:
    partial = write_partial(store)
    write_partial(store, key="other")
    commit(store, "other")
    (store.path(KIND, "other") / MANIFEST).rename(partial / MANIFEST)
    assert not list(store.manifests())


# -- crashes


def die_at(event_number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process that dies without a word at its n-th change of the disk; True if it came through.

    Reading is not counted: a process that dies between two reads leaves what one that dies before them leaves.
    """
    changes = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
    process = os.fork()
    if process == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in changes and not (event == "open" and arguments[1] in {"r", "rb", None}):
                seen += 1
                if seen > event_number:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in {0, 9}
    return status == 0


@pytest.mark.parametrize("before", ["nothing", "a damaged one"])
def test_a_crash_at_any_instant_leaves_the_artifact_whole_or_not_there(tmp_path: Path, before: str) -> None:
    for event_number in range(200):
        store = Store(tmp_path / f"store{event_number}")
        if before == "a damaged one":
            write_partial(store)
            commit(store)
            flip(store.path(KIND, KEY) / "weights.bin", 7)
        write_partial(store, FILES | {"new": b"new"})
        came_through = die_at(event_number, lambda store=store: commit(store))
        after = Store(store.root)
        status = after.status(KIND, KEY, fresh=True)
        if status.state == "valid":
            assert status.manifest and set(status.manifest.files) == {*FILES, "new"}
        else:
            assert not came_through
            write_partial(after, FILES | {"new": b"new"})  # the same command again
            commit(after)
            assert after.status(KIND, KEY, fresh=True).state == "valid"
            assert not list(store.root.rglob(".*.unwritten"))
        if came_through:
            assert event_number > 5
            return
    pytest.fail("the commit never came through")


def test_a_lock_is_free_when_its_holder_was_killed(store: Store) -> None:
    code = (
        f"import time\nfrom mcore.artifacts import Store\nwith Store({str(store.root)!r}).lock({KIND!r}, {KEY!r}):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match="held by another run"), store.lock(KIND, KEY, timeout_s=0.2):
            pytest.fail("two hold the lock")
        with store.lock(KIND, "another", timeout_s=0.2):
            pass
        process.kill()
    with store.lock(KIND, KEY, timeout_s=5):
        pass


def test_of_six_runs_at_once_one_makes_and_the_others_reuse(store: Store) -> None:
    code = f"""
import os, time
from mcore.artifacts import Store
store = Store({str(store.root)!r})
time.sleep(max(0, {time.time() + 1.5} - time.time()))
with store.lock("train", "k"):
    if store.find("train", "k"):
        print("reused")
    else:
        folder = store.partial("train", "k")
        folder.mkdir(parents=True)
        for name in "abc":
            (folder / name).write_text(str(os.getpid()))
        nothing = dict.fromkeys(("inputs", "input_content", "ingredients", "metrics", "versions"), {{}})
        store.commit("train", "k", **nothing, duration_s=0)
        print("made")
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["made", *["reused"] * 5]
    assert Store(store.root).status("train", "k", fresh=True).state == "valid"


def test_commits_of_different_keys_at_once_keep_all_digests(store: Store) -> None:
    code = (
        f"import sys, time\nfrom mcore.artifacts import Store\nstore = Store({str(store.root)!r})\n"
        f"time.sleep(max(0, {time.time() + 1.5} - time.time()))\n"
        "for number in range(5):\n"
        "    key = f'{sys.argv[1]}-{number}'\n    folder = store.partial('x', key)\n    folder.mkdir(parents=True)\n"
        "    (folder / 'file').write_text(key)\n"
        "    nothing = dict.fromkeys(('inputs', 'input_content', 'ingredients', 'metrics', 'versions'), {})\n"
        "    store.commit('x', key, **nothing, duration_s=0)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    known = json.loads((store.root / ".digests.json").read_text())
    assert len(list(store.manifests())) == 20
    assert set(known) == {str(path) for path in store.root.glob("x/*/file")}


# -- digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are really read."""
    names: list[str] = []

    def counting(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("mcore.artifacts.file_digest", counting)
    return names


def test_an_unchanged_artifact_is_never_read_again(made: Store, hashed: list[str]) -> None:
    assert made.status(KIND, KEY).state == "valid"
    assert Store(made.root).status(KIND, KEY).state == "valid"
    assert hashed == []
    assert Store(made.root).status(KIND, KEY, fresh=True).state == "valid"
    assert sorted(hashed) == ["empty", "tokenizer.json", "weights.bin"]


def test_a_change_right_after_the_hashing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.13, two changes within one tick of the kernel's clock bear the same time."""
    exact = artifacts._identity
    tick_ns = 10_000_000

    def coarse(path: Path) -> list[int]:
        size, inode, *times = exact(path)
        return [size, inode, *(time_ns // tick_ns * tick_ns for time_ns in times)]

    monkeypatch.setattr(artifacts, "_identity", coarse)
    path, cache, random_bytes = tmp_path / "file", DigestCache(tmp_path / "digests.json"), random.Random(0)
    for _ in range(20):
        path.write_bytes(random_bytes.randbytes(64))
        cache.digest(path)
        with path.open("r+b") as file:  # the same inode and size
            file.write(random_bytes.randbytes(64))
        assert cache.digest(path) == file_digest(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": [[1], 2, 3]}', '{"a": [["x"], "y"]}', "\x00"])
def test_a_damaged_cache_is_only_slower(tmp_path: Path, text: str) -> None:
    (tmp_path / "digests.json").write_text(text)
    (tmp_path / "file").write_text("content")
    cache = DigestCache(tmp_path / "digests.json")
    assert cache.digest(tmp_path / "file") == file_digest(tmp_path / "file")
    cache.save()
    assert set(json.loads((tmp_path / "digests.json").read_text())) == {str(tmp_path / "file")}


def test_the_cache_forgets_what_is_gone(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    for number in range(10):
        (tmp_path / str(number)).write_text("x")
        cache.digest(tmp_path / str(number))
    cache.save()
    for number in range(9):
        (tmp_path / str(number)).unlink()
    (tmp_path / "new").write_text("y")
    cache.digest(tmp_path / "new")
    cache.save()
    assert set(json.loads((tmp_path / "digests.json").read_text())) == {str(tmp_path / "9"), str(tmp_path / "new")}


def test_a_relative_path_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    cache = DigestCache(tmp_path / "digests.json")
    monkeypatch.chdir(tmp_path)
    assert cache.digest(Path("file")) == cache.digest(tmp_path / "file")
    assert hashed == ["file"]


def test_a_folder_is_digested_by_name_and_content(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "notes.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub.json").mkdir()
    cache = DigestCache(tmp_path / "digests")
    found = folder_digest(cache, tmp_path, patterns=("*.json", "*.safetensors", "config.*"))
    assert list(found) == ["config.json", "model.safetensors"]
    assert found["config.json"] == file_digest(tmp_path / "config.json")


# -- links to results


def test_a_published_link_is_relative_and_moves_in_one_step(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / "store" / "export" / name).mkdir(parents=True)
    link = tmp_path / "store" / "runs" / "demo" / "model"
    for name in ("first", "second"):
        publish_link(link, tmp_path / "store" / "export" / name)
        assert link.resolve() == tmp_path / "store" / "export" / name
    assert str(link.readlink()) == "../../export/second"
    (tmp_path / "store").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "runs" / "demo" / "model").is_dir()
    assert [path.name for path in (tmp_path / "moved" / "runs" / "demo").iterdir()] == ["model"]
