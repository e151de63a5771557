"""Output folders: whole or not at all, whatever happens while they are made."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcore.errors import ConfigError
from mcore.folders import refuse_existing, remove, remove_unwritten, whole_folder, write_durably


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with whole_folder(output) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("a")
        assert not output.exists() and folder.parent == output.parent
    assert tree(tmp_path) == {"new/out/sub/file": "a"}


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_everything_as_it_was(tmp_path: Path, ending: type[BaseException]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    with pytest.raises(ending), whole_folder(output, overwrite=True) as folder:
        (folder / "file").write_text("new")
        raise ending
    assert tree(tmp_path) == {"out/file": "old"}
    with pytest.raises(ending), whole_folder(tmp_path / "other"):
        raise ending
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
def test_what_exists_is_refused_unless_it_may_be_replaced(tmp_path: Path, kind: str) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("old")
    else:
        output.symlink_to("elsewhere" if kind == "link" else "nowhere")
    with pytest.raises(ConfigError, match="--overwrite"), whole_folder(output):
        pytest.fail("the block must not run")
    with whole_folder(output, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"elsewhere/kept": "kept", "out/file": "new"}
    assert not output.is_symlink()


def test_the_working_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for output in (Path(), tmp_path, Path("../inner"), Path("/")):
        with pytest.raises(ConfigError), whole_folder(output, overwrite=True):
            pytest.fail("the block must not run")


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError), whole_folder(output):
        output.mkdir()
        (output / "file").write_text("theirs")
    assert tree(tmp_path) == {"out/file": "theirs"}


def test_a_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with whole_folder(output) as folder:
        (folder / "file").write_text("first")
        code = f"from mcore.folders import *\nwith whole_folder(Path({str(output)!r})): pass"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert second.returncode != 0 and "being made by another process" in second.stderr
    assert tree(tmp_path) == {"out/file": "first"}


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = (
        "import time\nfrom mcore.folders import *\n"
        f"with whole_folder(Path({str(output)!r})) as folder:\n"
        "    (folder / 'stale').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert list(tree(tmp_path)) == [".out.partial/stale"]
    with whole_folder(output) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out/file": "new"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "file").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(ConfigError), whole_folder(output):
        pytest.fail("the old folder is back and in the way")
    assert tree(tmp_path) == {"out/file": "old"}
    with whole_folder(output, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out/file": "new"}


def test_a_place_that_cannot_be_written_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, message in (("file/out", "above .*: expected a folder, found no folder"), ("x" * 300, "name too long")):
        with pytest.raises(ConfigError, match=message), whole_folder(tmp_path / name):
            pytest.fail("the block must not run")
    with pytest.raises(ConfigError, match="no folder"):  # told before any work is done
        refuse_existing(tmp_path / "file" / "sub" / "out", overwrite=True)
    assert tree(tmp_path) == {"file": ""}


def test_eight_processes_make_one_folder_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = (
        "import os, sys, time\nfrom mcore.folders import *\nfrom mcore.errors import ConfigError\n"
        f"time.sleep(max(0, {time.time() + 1.5} - time.time()))\n"
        "try:\n"
        f"    with whole_folder(Path({str(output)!r})) as folder:\n"
        "        for name in 'abc':\n            (folder / name).write_text(str(os.getpid()))\n"
        "except ConfigError:\n    sys.exit(2)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(8)]
    assert sorted(process.wait() for process in processes) == [0, *[2] * 7]
    assert len(set(tree(output).values())) == 1 and set(tree(output)) == set("abc")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_small_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tracker.txt"
    write_durably(path, "100")
    write_durably(path, "200")
    assert tree(tmp_path) == {"tracker.txt": "200"}

    def disk_is_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "300")
    assert tree(tmp_path) == {"tracker.txt": "200"}


def test_what_a_kill_left_of_a_small_file_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from mcore.folders import write_durably\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_durably(Path({str(tmp_path / 'tracker.txt')!r}), '100')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    write_durably(tmp_path / "tracker.txt", "200")
    remove_unwritten(tmp_path)
    assert tree(tmp_path) == {"tracker.txt": "200"}


def test_remove_takes_what_is_there_and_spares_what_a_link_points_at(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    (tmp_path / "link").symlink_to("folder")
    for name in ("link", "nothing"):
        remove(tmp_path / name)
    assert list(tree(tmp_path)) == ["folder/file"]
    remove(tmp_path / "folder" / "file")
    remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
