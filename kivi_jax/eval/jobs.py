"""Long jobs that survive being killed: one JSON line per finished item, never computed twice.

A file's first line holds the settings that its records were computed with; lines are appended and
flushed to disk batch by batch. A line that a cut tore is dropped when the file is opened again.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress

Record = dict[str, Any]
Item = TypeVar("Item")
_BEGIN = b'{"settings": '


def is_ours(path: Path) -> bool:
    """Whether a file holds records that this program wrote, be its first line cut off."""
    with path.open("rb") as file:
        head = file.read(len(_BEGIN))
    return bool(head) and _BEGIN.startswith(head)


def read_records(path: Path) -> tuple[Record, list[Record]]:
    """A file's settings and its records; an absent or empty file has neither.

    Raises:
        ValueError: a line other than a torn last one is not JSON, or the settings are missing, or two records
            have one id.
    """
    return _read(path)[:2]


def _read(path: Path) -> tuple[Record, list[Record], int]:
    """`read_records`, and where the last whole line ends."""
    data = path.read_bytes() if path.exists() else b""
    # Also where no line has ended: a cut leaves the beginning of our own first line.
    if data[: len(_BEGIN)] != _BEGIN[: len(data)]:
        raise ValueError(f"{path} does not begin with settings: kivi-jax did not write it")
    try:
        first, *records = [json.loads(line) for line in data.split(b"\n")[:-1]] or [{"settings": {}}]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): move it away") from None
    settings, reason = first["settings"], "a line has no id, or the first no settings"
    named = all(isinstance(record, dict) and isinstance(record.get("id"), str) for record in records)
    if not isinstance(settings, dict) or (records and not settings) or not named:
        raise ValueError(f"{path} is damaged ({reason}): move it away")
    if twice := repeated(record.get("id") for record in records):
        raise ValueError(f"{path} holds {twice} more than once, so it would count as several: move it away")
    return settings, records, data.rfind(b"\n") + 1


def check_fields(path: Path, records: Iterable[Record], fields: Collection[str]) -> None:
    """Refuse records that lack what is to be read from them.

    Raises:
        ValueError: one does.
    """
    for record in records:
        if missing := [name for name in fields if name not in record]:
            reason = f"{record['id']} has no {', '.join(missing)}"
            raise ValueError(f"{path} is damaged ({reason}): move it away")


def paired(records: Sequence[Record], others: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The records of both that have the same ids, in one order."""
    by_id = {other["id"]: other for other in others}
    common = [record for record in records if record["id"] in by_id]
    return common, [by_id[record["id"]] for record in common]


def in_batches(
    items: Iterable[Item], size: int, *, key: Callable[[Item], tuple[int, ...]] = lambda _: ()
) -> list[list[Item]]:
    """Items of one `key` together, up to `size`; the largest key first: what does not fit shows at once."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [
        group[begin : begin + size]
        for _, group in sorted(groups.items(), key=lambda entry: entry[0], reverse=True)
        for begin in range(0, len(group), size)
    ]


def finish(
    path: Path,
    settings: Record,
    batches: Sequence[Sequence[Item]],
    compute: Callable[[Sequence[Item]], Iterable[Record]],
    *,
    identify: Callable[[Item], str],
    progress: Progress,
    fields: Collection[str] = (),
) -> list[Record]:
    """All records of all items, computing and appending those that `path` does not hold.

    `compute` gets whole batches where nothing of them is done, else what is left of them, and gives a
    record per item, to which `id` is added. Every record has at least the `fields`.

    Raises:
        ValueError: the file holds records of other settings, or anything that is not ours, or it cannot be
            written, or another process writes to it; or two items have one id; or see `read_records`.
    """
    from convert.files import locked, writing  # slow to import; reports need it not

    wanted = [identify(item) for batch in batches for item in batch]
    if twice := repeated(wanted):
        raise ValueError(f"two samples have the id {twice}: give each its own, to tell their answers apart")
    with writing(path):
        path = path.resolve()  # whatever links to one file has one lock
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file, in which a cut run could go on: choose another place")
    held, records = read_records(path)
    check_fields(path, records, fields)
    done = {record["id"]: record for record in records}
    if held == settings and done.keys() >= set(wanted):  # only read, so by several processes at once
        return [done[name] for name in wanted]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), path):
        return _finish(path, settings, batches, compute, identify, progress)


def _finish(
    path: Path,
    settings: Record,
    batches: Sequence[Sequence[Item]],
    compute: Callable[[Sequence[Item]], Iterable[Record]],
    identify: Callable[[Item], str],
    progress: Progress,
) -> list[Record]:
    from convert.files import writing

    held, records, end = _read(path)
    first = _line({"settings": settings})
    if not held and path.exists() and not first.startswith(path.read_bytes()):
        raise ValueError(f"{path} is not what a cut run left: choose another place, or move it away")
    if held and held != settings:
        changed = ", ".join(_changes(held, settings))
        raise ValueError(f"{path} was computed with {changed}: choose another place, or move it away")
    done = {record["id"]: record for record in records}
    wanted = [identify(item) for batch in batches for item in batch]
    bar = progress.add_task(path.stem, total=len(wanted), completed=sum(name in done for name in wanted))
    with writing(path):
        with path.open("ab") as file:
            file.truncate(end if held else 0)
        if not held:
            append(path, first)
    for batch in batches:
        left = [item for item in batch if identify(item) not in done]
        if not left:
            continue
        new = [{"id": identify(item)} | record for item, record in zip(left, compute(left), strict=True)]
        with writing(path):
            append(path, b"".join(map(_line, new)))
        done |= {record["id"]: record for record in new}
        progress.advance(bar, len(left))
    return [done[name] for name in wanted]


def repeated(names: Iterable[Any]) -> Any | None:
    """The first name that was there before, if any."""
    seen: set[Any] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _changes(held: Record, wanted: Record) -> Iterator[str]:
    """What differs between two settings, of files (see `contents.py`) their names alone."""
    for name in _differing(held, wanted):
        before, now = held.get(name), wanted.get(name)
        if name == "contents":
            yield f"other contents of its {', '.join(_differing(before or {}, now or {}))}"
        else:
            yield f"{name}={before!r}, not {now!r}"


def _differing(first: Record, second: Record) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def append(path: Path, lines: bytes) -> None:
    """Append in one piece, and wait until it is on disk."""
    with path.open("ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
