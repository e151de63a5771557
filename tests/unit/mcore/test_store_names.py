"""Whatever a name says, a path made of it is in the store, or there is none; links in the store lead nowhere."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcore.artifacts import MANIFEST, Manifest, Store
from mcore.errors import ArtifactError, ConfigError
from mcore.folders import remove
from mcore.runs import RunRecord
from mcore.store_names import checked_artifact, checked_file
from tests.unit.flows.command_line import mcore_flows
from tests.unit.mcore.test_artifacts import KEY, KIND, commit, contents, write_partial

ROOT = Path("/somewhere/store")

nasty = st.lists(
    st.sampled_from(["..", ".", "/", "\\", "~", "a", "-", "\0", "\n", " ", "ü", "\u202e", "\ud800", "$(x)", ""]),
    max_size=6,
).map("".join)
names = nasty | st.text(max_size=20) | st.from_regex(r"[0-9a-z_]{1,8}", fullmatch=True)


def is_direct_child(path: Path, folder: Path) -> bool:
    return Path(os.path.normpath(path)).parent == folder and path == Path(os.path.normpath(path))


@given(kind=names, key=names)
@example(kind="..", key="x")
@example(kind="convert", key="/etc")
@example(kind="convert", key="a\n")
@example(kind="", key="")
def test_no_name_leads_out_of_the_store(kind: str, key: str) -> None:
    store = Store(ROOT)
    makes = {
        lambda: store.path(kind, key): ROOT / kind if "\0" not in kind else ROOT,
        lambda: store.partial(kind, key): ROOT / ".partial",
        lambda: store.run_dir(key): ROOT / "runs",
    }
    for make, folder in makes.items():
        try:
            path = make()
        except ConfigError as error:
            assert error.problems
            continue
        assert is_direct_child(path, folder) and path.is_relative_to(ROOT)
        str(path).encode("ascii")
        assert str(path).isprintable() and " " not in str(path)
    assert store.status(kind, key).state == "missing"


@given(names)
def test_every_name_that_the_project_makes_is_taken(name: str) -> None:
    for made in ("convert", "verify_export", "smollm2_135m_cpu", "0a.b-c", KEY, "1.5b-v2+lora"):
        assert Store(ROOT).path(made, made) == ROOT / made / made
    if not (name.isascii() and name.isalnum()):
        return
    assert checked_artifact(f"{name}/{name}") == (name, name)


@given(nasty)
@example("../x")
@example("a/../../x")
@example("/etc/passwd")
@example("a\0")
@example(".")
def test_no_file_of_an_artifact_lies_outside_of_it(name: str) -> None:
    try:
        checked_file(name)
    except ConfigError:
        return
    assert Path(os.path.normpath(ROOT / name)).is_relative_to(ROOT) and "\0" not in name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    write_partial(store)
    commit(store)
    return store


def forged(store: Store, **changes: object) -> str:
    """Why a manifest with these changes, its own digest put right, is not taken."""
    import hashlib

    path = store.path(KIND, KEY) / MANIFEST
    content = json.loads(path.read_text()) | changes
    del content["sha256"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **content}))
    with pytest.raises(ValueError, match="can't be read") as caught:
        Manifest.read(path.parent)
    status = store.status(KIND, KEY)
    assert status.state == "damaged" and status.manifest is None and not list(store.manifests())
    return str(caught.value)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "sub/../../../secret"])
def test_a_manifest_that_names_files_outside_is_not_taken(store: Store, name: str) -> None:
    entry = {"size": 3, "sha256": "0" * 64}
    assert "no name of a file" in forged(store, files={name: entry})


@pytest.mark.parametrize("changes", [{"inputs": {"hf": "../../x"}}, {"kind": ".."}, {"key": "a/b"}])
def test_a_manifest_whose_lineage_leads_outside_is_not_taken(store: Store, changes: dict[str, object]) -> None:
    assert "no name of anything in a store" in forged(store, **changes)


@pytest.mark.parametrize("name", ["../../../etc", "/etc", ".locks", "a b", "x\n"])
def test_a_record_of_a_run_elsewhere_is_none(name: str) -> None:
    record = RunRecord(name=name, flow="pipeline", config={}, stages=(), folder="/", pid=1, started="")
    with pytest.raises(ValueError, match="no record of a run"):
        RunRecord.from_json(record.to_json())


def test_the_command_line_refuses_names_that_lead_outside(store: Store) -> None:
    (store.root.parent / "report.md").write_text("a secret\n")
    for command in (["report", "../.."], ["status", "../x"]):
        done = mcore_flows(*command, "--store", store.root, cwd=store.root.parent)
        assert done.returncode == 2 and "a secret" not in done.stdout + done.stderr, (command, done.stderr)
    done = mcore_flows("artifacts", "show", "../..", "--store", store.root, cwd=store.root.parent)
    assert done.returncode == 2


class TestLinks:
    """What a link in the store points at is neither used, nor written, nor deleted."""

    @pytest.fixture
    def outside(self, store: Store, tmp_path: Path) -> Path:
        """The artifact's folder, moved away."""
        return store.path(KIND, KEY).rename(tmp_path / "outside")

    def test_an_artifacts_folder_elsewhere_is_none(self, store: Store, outside: Path) -> None:
        store.path(KIND, KEY).symlink_to(outside)
        assert (store.status(KIND, KEY).state, store.status(KIND, KEY).why) == ("damaged", "replaced by a link")
        before = contents(outside)
        write_partial(store, {"weights.bin": b"new"})
        commit(store)
        assert store.status(KIND, KEY).state == "valid" and not store.path(KIND, KEY).is_symlink()
        assert contents(outside) == before

    def test_a_folder_in_an_artifact_elsewhere_damages_it(self, store: Store, tmp_path: Path) -> None:
        folder = store.path(KIND, KEY) / "sub"
        folder.rename(tmp_path / "sub")
        folder.symlink_to(tmp_path / "sub")
        assert store.status(KIND, KEY).why == "sub/deep/tokenizer.json: replaced by a link"

    def test_a_kind_elsewhere_is_neither_read_nor_written(self, store: Store, tmp_path: Path) -> None:
        (store.root / KIND).rename(tmp_path / "kind")
        (store.root / KIND).symlink_to(tmp_path / "kind")
        assert store.status(KIND, KEY).state == "damaged"
        before = contents(tmp_path / "kind")
        write_partial(store, {"weights.bin": b"new"})
        with pytest.raises(ArtifactError, match="symbolic link"):
            commit(store)
        assert contents(tmp_path / "kind") == before

    @pytest.mark.parametrize("name", [".partial", f".partial/{KIND}-{KEY}"])
    def test_what_is_made_elsewhere_is_not_committed(self, store: Store, tmp_path: Path, name: str) -> None:
        outside = tmp_path / "elsewhere"
        place = store.root / name
        remove(place)
        if name == ".partial":
            (outside / f"{KIND}-{KEY}").mkdir(parents=True)
        else:
            outside.mkdir()
        place.symlink_to(outside)
        store.partial(KIND, KEY).joinpath("weights.bin").write_bytes(b"w")
        store.partial(KIND, KEY).joinpath(MANIFEST).write_bytes(b"theirs")
        before = contents(outside)
        with pytest.raises(ArtifactError, match="symbolic link"):
            commit(store)
        assert contents(outside) == before

    def test_a_store_may_itself_be_a_link(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(store.root)
        linked = Store(tmp_path / "link")
        assert linked.status(KIND, KEY).state == "valid"
        write_partial(linked, {"weights.bin": b"new"}, key="other")
        commit(linked, key="other")
        assert store.status(KIND, "other").state == "valid"
