"""Only what this package wrote is replaced, by one writer at a time, and no killed run leaves traces."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convert.errors import CheckpointError
from convert.files import replacing

ROOT = Path(__file__).parents[2]
OURS = {"manifest": "kivi_jax.json"}


def write(destination, content="new", **options):
    with replacing(destination, **OURS | {"overwrite": True, **options}) as partial:
        (partial / "parameters").mkdir()
        (partial / "parameters" / "weights").write_text("x")
        (partial / "tokenizer.json").write_text("{}")
        manifest = {"format": 2, "files": {"weights": 1}, "beside": ["tokenizer.json"], "content": content}
        (partial / "kivi_jax.json").write_text(json.dumps(manifest))


def written(directory):
    return json.loads((directory / "kivi_jax.json").read_text())["content"]


def content(directory):
    return {str(path.relative_to(directory)): path.is_file() for path in sorted(directory.rglob("*"))}


def test_what_was_written_is_replaced_if_asked(tmp_path):
    write(tmp_path / "saved", "old")
    with pytest.raises(CheckpointError, match=r"is not empty.*--overwrite"):
        write(tmp_path / "saved", overwrite=False)
    write(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")
    write(tmp_path / "link", "through the link")
    assert written(tmp_path / "saved") == "through the link"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "saved"]


def test_what_was_written_as_another_kind_is_not_replaced(tmp_path):
    write(tmp_path / "model", "old")
    message = "model is a converted model, which a saved prefix does not replace: choose another"
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "model", manifest="prefix.json")
    (tmp_path / "prefix" / "arrays").mkdir(parents=True)
    (tmp_path / "prefix" / "prefix.json").write_text('{"format": 1, "files": {}}')
    with pytest.raises(CheckpointError, match="prefix is a saved prefix, which a converted model does not"):
        write(tmp_path / "prefix")
    assert written(tmp_path / "model") == "old"
    assert (tmp_path / "prefix" / "prefix.json").is_file()


@pytest.mark.parametrize(
    "files", [["precious.txt"], ["prefix.json"], ["sub/kivi_jax.json", "sub/parameters/x"]]
)
def test_what_others_wrote_is_never_replaced(tmp_path, files):
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("x")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="holds files that kivi-jax did not write"):
        write(tmp_path / "mine")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "parameters/mine", "parameters/sub/mine", "sub/weights", "prefix.json", ".env", "link"],
)
def test_what_was_put_beside_ours_is_never_replaced(tmp_path, name):
    write(tmp_path / "saved")
    mine = tmp_path / "saved" / name
    mine.parent.mkdir(exist_ok=True)
    if name == "link":
        mine.symlink_to("nowhere")
    else:
        mine.write_text("x")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=rf"files that kivi-jax did not write \({re.escape(name)}\)"):
        write(tmp_path / "saved")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "manifest", ["", "[]", "null", "{}", '{"format": "2", "files": {}}', '{"format": 2}', "[" * 200_000]
)
def test_a_file_of_a_manifests_name_is_none(tmp_path, manifest):
    (tmp_path / "mine" / "parameters").mkdir(parents=True)
    (tmp_path / "mine" / "kivi_jax.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"did not write \(kivi_jax\.json\)"):
        write(tmp_path / "mine")


@pytest.mark.parametrize("precious", ["", "below", "source", "source/file"])
def test_nothing_that_holds_the_source_is_replaced(tmp_path, precious):
    """Nor the current directory, nor the home directory, whatever they hold."""
    write(tmp_path / "saved")
    for name in ("source/file", "below"):
        (tmp_path / "saved" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be replaced, as .* is in it"):
        write(tmp_path / "saved", sources=[tmp_path / "saved" / precious])


def test_what_is_elsewhere_or_nowhere_is_no_source_in_it(tmp_path):
    write(tmp_path / "saved")
    write(tmp_path / "saved", sources=[tmp_path, tmp_path / "saved2", tmp_path / "saved" / "demo"])


def test_the_current_and_the_home_directory_are_never_replaced(tmp_path, monkeypatch):
    for name in ("home", "here"):
        write(tmp_path / name)
        (tmp_path / name / "sub").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "sub"))
    monkeypatch.chdir(tmp_path / "here" / "sub")
    for name in ("home", "here", "here/sub", "."):
        with pytest.raises(CheckpointError, match=r"cannot be replaced, as .* is in it"):
            write(tmp_path / name)


def test_a_file_or_a_mount_point_is_no_destination(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(CheckpointError, match="is a file"):
            write(tmp_path / name)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(CheckpointError, match="disk is a mount point"):
        write(tmp_path / "disk")


@pytest.mark.parametrize("name", [".saved.partial/thesis.txt", ".saved.partial", ".saved.lock"])
def test_what_stands_where_the_work_is_done_is_left(tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match="is in the way, and kivi-jax did not make it: move it away"):
        write(tmp_path / "saved")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "saved").exists()


def test_the_later_of_two_writers_is_refused(tmp_path):
    with replacing(tmp_path / "saved", **OURS, overwrite=False) as partial:
        with pytest.raises(CheckpointError, match="saved is being written by another process"):
            write(tmp_path / "saved")
        write(tmp_path / "other")
        (partial / "first").write_text("x")
    assert (tmp_path / "saved" / "first").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "saved"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path):
    def late():
        with replacing(tmp_path / "saved", **OURS, overwrite=True):
            (tmp_path / "saved").mkdir()
            (tmp_path / "saved" / "precious").write_text("x")

    with pytest.raises(CheckpointError, match="did not write"):
        late()
    assert content(tmp_path) == {"saved": False, "saved/precious": True}


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_the_destination_as_it_was(tmp_path, existed):
    if existed:
        write(tmp_path / "saved", "old")
    before = content(tmp_path)

    def fail():
        with replacing(tmp_path / "saved", **OURS, overwrite=True) as partial:
            (partial / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(tmp_path) == before


SLOW = """
import sys, time, pathlib
from convert.files import replacing
from kivi_jax.console import main

def command():
    with replacing(pathlib.Path(sys.argv[1]), manifest="kivi_jax.json", overwrite=True) as partial:
        (partial / "half").write_text("x")
        print("writing", flush=True)
        time.sleep(600)

main(command)
"""


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_or_what_the_next_one_removes(tmp_path, ended):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "saved")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(CheckpointError, match="being written by another process"):
            write(tmp_path / "saved")
        process.send_signal(ended)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ([] if ended == signal.SIGTERM else [".saved.lock", ".saved.partial"])
    write(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_a_killed_run_had_moved_away_comes_back(tmp_path):
    """Killed between its two renames: what it was to replace is all there is."""
    write(tmp_path / ".saved.partial" / "old", "precious")
    with pytest.raises(CheckpointError, match="is not empty"):
        write(tmp_path / "saved", overwrite=False)
    assert written(tmp_path / "saved") == "precious"


def test_an_interrupt_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path / "saved", "precious")
    rename, calls = Path.rename, []

    def rename_but_once(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_but_once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "saved", "new")
    assert written(tmp_path / "saved") == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_comes_while_a_failed_write_is_removed_is_removed_too(tmp_path, monkeypatch):
    """After a full disk, orbax's threads may still be writing."""
    remove, calls = shutil.rmtree, []

    def remove_but_for_late_files(path, **options):
        remove(path, **options)
        calls.append(path)
        if len(calls) < 3:
            path.mkdir()
            (path / "late").write_text("x")

    monkeypatch.setattr(shutil, "rmtree", remove_but_for_late_files)
    with pytest.raises(RuntimeError, match="cut"), replacing(tmp_path / "saved", **OURS, overwrite=False):
        raise RuntimeError("cut")
    assert len(calls) == 3
    assert content(tmp_path) == {}
