"""Jobs survive being killed: nothing is lost, nothing is computed twice."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.progress import Progress

from convert.files import locked
from kivi_jax.eval.jobs import finish, read_records

SETTINGS = {"eval": "test", "cache": "full"}
BATCHES = [["a", "b"], ["c", "d"], ["e"]]


def run(path, batches=BATCHES, settings=SETTINGS):
    """The records, and the items that were computed for them."""
    computed = []

    def compute(batch):
        computed.extend(batch)
        return [{"prediction": item.upper() + "é"} for item in batch]

    with Progress(disable=True) as progress:
        records = finish(path, settings, batches, compute, identify=str, progress=progress)
    return records, computed


def test_records_come_in_the_items_order_and_once(tmp_path):
    records, computed = run(tmp_path / "r" / "full.jsonl")
    assert [record["id"] for record in records] == computed == ["a", "b", "c", "d", "e"]
    assert run(tmp_path / "r" / "full.jsonl") == (records, [])
    assert read_records(tmp_path / "r" / "full.jsonl") == (SETTINGS, records)


@pytest.mark.parametrize("kept", range(0, 200, 7))
def test_a_file_cut_anywhere_is_finished_as_if_it_had_not_been(tmp_path, kept):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    records, _ = run(whole)
    cut.write_bytes(whole.read_bytes()[:kept])
    held = {record["id"] for record in read_records(cut)[1]}
    again, computed = run(cut)
    assert again == records
    assert sorted([*held, *computed]) == ["a", "b", "c", "d", "e"]
    assert cut.read_bytes() == whole.read_bytes()


def test_more_items_are_added_and_other_settings_refused(tmp_path):
    path = tmp_path / "full.jsonl"
    run(path, BATCHES[:1])
    assert run(path)[1] == ["c", "d", "e"]
    with pytest.raises(ValueError, match="cache='full', not 'kivi2': choose another place"):
        run(path, settings=SETTINGS | {"cache": "kivi2"})
    with pytest.raises(ValueError, match="computed with other contents of its data, model: choose"):
        run(path, settings=SETTINGS | {"contents": {"data": "a", "model": "b"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"my": "one line without an end"}', "does not begin with settings"),
        ("42\n43\n", "does not begin with settings"),
        ("null\n", "does not begin with settings"),
        ('{"settings": {"theme": "dark"}, "folders": []}', "is not what a cut run left"),
        ('{"settings": {}, "folders": ["a"]}\n', "is not what a cut run left"),
        ('{"settings": 5}\n', "is damaged"),
        ('{"settings": {}}\n{"id": "a"}\n', "is damaged"),
        ('{"settings": {"eval": "test", "cache": "full"}}\n{"note": 1}\n', "a line has no id"),
        ('{"settings": {"eval": "test", "cache": "full"}}\n[1]\n', "a line has no id"),
        ('{"settings": {"eval": "test", "cache": "full"}}\n{"id": ["a"]}\n', "a line has no id"),
    ],
)
def test_what_another_wrote_is_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(path)
    assert path.read_text() == text


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "full.jsonl"
    path.write_text('{"settings": {}}\nnot json\n')
    with pytest.raises(ValueError, match="is damaged"):
        read_records(path)
    path.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="does not begin with settings"):
        read_records(path)
    path.write_text('{"settings": ' + "[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_records(path)


def test_samples_of_one_id_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "full.jsonl"
    with pytest.raises(ValueError, match="two samples have the id a"):
        run(path, [["a", "b"], ["a"]])
    assert list(tmp_path.iterdir()) == []


def test_records_of_one_id_are_no_file_of_this_program(tmp_path):
    """Two writers at once, in former versions: each prediction would count twice."""
    path = tmp_path / "full.jsonl"
    run(path)
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(ValueError, match="holds a more than once"):
        run(path)


def test_records_without_what_is_read_of_them_are_damaged(tmp_path):
    path = tmp_path / "full.jsonl"
    run(path)
    with (
        Progress(disable=True) as progress,
        pytest.raises(ValueError, match=r"full\.jsonl is damaged \(a has no text\): move it away"),
    ):
        finish(path, SETTINGS, BATCHES, list, identify=str, progress=progress, fields=["text"])


def test_the_later_of_two_writers_is_refused(tmp_path):
    path = tmp_path / "full.jsonl"

    def compute(batch):
        with pytest.raises(ValueError, match=r"full\.jsonl is being written by another process"):
            run(path)
        return [{} for _ in batch]

    with Progress(disable=True) as progress:
        finish(path, SETTINGS, BATCHES, compute, identify=str, progress=progress)
    assert [file.name for file in tmp_path.iterdir()] == ["full.jsonl"]
    assert len(read_records(path)[1]) == 5


def test_a_finished_file_is_only_read(tmp_path):
    """So caches may be computed by several processes, each of which asks for the full one, too."""
    path = tmp_path / "full.jsonl"
    records, _ = run(path)
    with locked(path.with_name(".full.jsonl.lock"), path):
        assert run(path) == (records, [])


def test_a_link_is_written_to_by_who_has_its_file(tmp_path):
    path, link = tmp_path / "full.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)

    def compute(batch):
        with pytest.raises(ValueError, match="is being written by another process"):
            run(link)
        return [{} for _ in batch]

    with Progress(disable=True) as progress:
        finish(path, SETTINGS, BATCHES[:1], compute, identify=str, progress=progress)


def test_what_cannot_be_written_is_one_line_with_its_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"null is no regular file.*choose another place"):
        run(Path(os.devnull))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"full\.jsonl cannot be written: "):
        run(tmp_path / "file" / "full.jsonl")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"full\.jsonl cannot be written: No space left"):
        run(tmp_path / "full.jsonl")
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # what cannot be written fails once more when the file is closed
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(ValueError, match=r"other\.jsonl cannot be written: File too large"):
            run(tmp_path / "other.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


SCRIPT = """
import pathlib, sys, time
from rich.progress import Progress
from kivi_jax.eval.jobs import finish
path, log = map(pathlib.Path, sys.argv[1:])

def compute(batch):
    time.sleep(0.02)
    with log.open("a") as file:
        print(*batch, file=file)
    return [{"prediction": item * 1000} for item in batch]

with Progress(disable=True) as progress:
    finish(path, {"eval": "x"}, [[str(i)] for i in range(40)], compute, identify=str, progress=progress)
"""


def test_a_killed_process_leaves_what_it_finished(tmp_path):
    whole, cut, log = (tmp_path / name for name in ("whole.jsonl", "cut.jsonl", "log"))
    command = [sys.executable, "-c", SCRIPT]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen([*command, cut, log], env=environment)
    deadline = time.monotonic() + 120
    while not (cut.exists() and cut.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    held = [record["id"] for record in read_records(cut)[1]]
    assert 5 <= len(held) < 40
    log.write_text("")
    subprocess.run([*command, cut, log], env=environment, check=True)
    assert sorted(map(int, log.read_text().split())) == [i for i in range(40) if str(i) not in held]
    subprocess.run([*command, whole, log], env=environment, check=True)
    assert cut.read_bytes() == whole.read_bytes()
