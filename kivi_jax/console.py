"""What every command shares: how it starts and ends, and how bytes and tables look."""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import platformdirs
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from kivi_jax.signals import ending

INTERRUPTED = 128 + signal.SIGINT  # the exit code that typer gives a KeyboardInterrupt, too
COMPILED = "KIVI_JAX_COMPILATION_CACHE"  # the directory of compiled programs, or off
NAME = 14  # columns for a cache's name, at least
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's UsageError, be it typer's own copy or not
NARROWEST = 26  # columns that a table takes: in fewer, rich would leave its names empty
READABLE = 70  # columns of a terminal in which all tables can be read


def main(app: Callable[[], Any]) -> None:
    """`run` as this process: signals unwind it, programs once compiled are kept, and text always prints.

    After an interruption nothing of the interpreter is torn down: XLA's threads may still compute, and crash.
    """
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        del frame
        stopped.append(number)
        raise KeyboardInterrupt

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
        elif stopped:  # a destructor or a callback was interrupted, and what it raises goes nowhere
            # To the process: a signal that a thread raises in itself does not wake the main one.
            threading.Timer(0.1, os.kill, (os.getpid(), stopped[-1])).start()

    sys.unraisablehook = again
    for number in ending():
        signal.signal(number, stop)
    accept_all_text()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("transformers").addFilter(_is_no_advice)
    logging.getLogger("absl").addFilter(_is_not_raised)
    keep_compiled()
    try:
        run(app)
    except (KeyboardInterrupt, SystemExit) as end:
        if not stopped or getattr(end, "code", INTERRUPTED) != INTERRUPTED:
            raise
    if stopped:
        with contextlib.suppress(OSError):  # a terminal may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(128 + stopped[0])


def accept_all_text() -> None:
    """Let no stream fail over a character, nor over being closed: what reads text says what is none.

    A terminal of 0 columns, as some that are none call themselves, is one of unknown width.
    """
    if os.environ.get("COLUMNS") == "0":  # rich would print nothing
        del os.environ["COLUMNS"]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? for what it has no sign for


def keep_compiled() -> None:
    """Let JAX keep compiled programs on disk, where the user has not said what it should do."""
    chosen = os.environ.get(COMPILED, "")
    if chosen.lower() in ("off", "0") or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = chosen or str(platformdirs.user_cache_path("kivi-jax", appauthor=False) / "compiled")
    try:
        os.makedirs(directory, exist_ok=True)  # else JAX warns at every program
    except OSError as error:
        if chosen:
            fail(
                f"{COMPILED}={chosen} cannot be written ({error.strerror}): choose another directory, or off"
            )
            sys.exit(2)
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_max_size", 2**30)  # the least recently used go first


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Whether a message of transformers is not its advice to install PyTorch, which nothing here needs."""
    return "PyTorch was not found" not in record.getMessage()


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Whether a message is not orbax's traceback of a thread whose error is raised, and said, afterwards."""
    return not re.search("_SignalingThread|background save thread", record.getMessage())


def run(app: Callable[[], Any]) -> None:
    """Run a command line; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        if isinstance(app, typer.Typer):  # its own report of a mistake would fill a screen
            code = app(standalone_mode=False)
            sys.exit(code if isinstance(code, int) else 0)
        app()
    except USAGE_ERROR as error:
        if text := error.format_message():  # else its help was asked for, and is printed
            place = "" if error.ctx is None else f" ({error.ctx.command_path} --help shows what there is)"
            fail(text[0].lower() + text[1:].rstrip(".") + place)
        sys.exit(2)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        memory = out_of_memory(error)
        expected = isinstance(error, NotImplementedError) or "Unable to initialize backend" in str(error)
        unexpected = memory is None and isinstance(error, RuntimeError) and not expected
        if unexpected or os.environ.get("KIVI_JAX_TRACEBACK"):  # for reporting a bug
            raise
        fail(memory or _said(error))
        sys.exit(2)


def _said(error: Exception) -> str:
    """An error's text. Of a full disk that is printed to, it has no name."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return f"what this prints cannot be written: {error.strerror}"
    return str(error)


def fail(message: str) -> None:
    """Say what went wrong, in one line on stderr."""
    text = escape(" ".join(message.split()))  # a path may look like rich's markup: model[/a]
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {text}", highlight=False)


def out_of_memory(error: BaseException) -> str | None:
    """What to do where memory has run out, in one line; None if `error` is about something else."""
    text = str(error)
    if isinstance(error, ValueError):  # files' libraries call a full disk RESOURCE_EXHAUSTED, too
        return None
    if not isinstance(error, MemoryError) and not re.search("RESOURCE_EXHAUSTED|Out of memory", text):
        return None
    found = re.search(r"(\d+) bytes|([\d.]+ ?[KMGT]iB)", text)
    wanted = "" if found is None else f": {format_bytes(int(found[1])) if found[1] else found[2]} more wanted"
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if limit is None and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = "" if limit is None else f", {format_bytes(limit)} on this {device.platform.upper()} in all"
    return (
        f"out of memory{wanted}{there}: take fewer tokens, fewer rows, or fewer bits (--cache kivi2); "
        "kivi-jax inspect plans what fits"
    )


def print_table(console: Console, table: Table) -> None:
    """Print a table; in a narrow terminal without its last columns, rather than with broken numbers."""
    console.width = max(console.width, NARROWEST)
    left_out: list[str] = []
    while console.width < READABLE and len(table.columns) > 2 and _width(console, table) > console.width:
        header = " ".join(str(table.columns.pop().header).split())
        left_out.insert(0, header)
    console.print(table)
    if left_out:
        console.print(f"a wider terminal also shows: {', '.join(left_out)}", style="dim", markup=False)


def _width(console: Console, table: Table) -> int:
    """Columns that a table needs for whole numbers; its first column, of names, can be folded."""
    widths = [
        max(console.measure(part).maximum for part in (column.header, *column.cells)) + 3
        for column in table.columns
    ]
    return 1 + min(widths[0], NAME) + sum(widths[1:])


def status(doing: str) -> Status:
    """A spinner on stderr, for as long as a `with` block lasts."""
    return Console(stderr=True).status(doing)


def format_bytes(count: int | float) -> str:
    """Bytes in binary units, three digits or four: 1.23 GiB, 1023 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            digits = 3 if abs(count) < 999.5 and unit != "B" else 4
            return f"{count:.{digits}g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def compare_bytes(size: int, full: int) -> str:
    """What a cache weighs beside a full one: "cache 1 MiB, full cache 5 MiB (5.00x smaller)".

    Short rows may weigh more than in a full cache: a residual or a pool has its size from the start.
    """
    ratio = f"{full / size:.2f}x smaller" if full >= size else f"{size / full:.2f}x larger"
    return f"cache {format_bytes(size)}, full cache {format_bytes(full)} ({ratio})"


def parse_bytes(text: str) -> int:
    """The bytes that "24GiB", "500 MB" or "1e9" mean.

    Raises:
        ValueError: it cannot be read.
    """
    units = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    number = text.strip().lower().rstrip("bkmgti ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        if (count := int(float(number) * units[unit])) < 0:
            raise ValueError("negative")
        return count
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"cannot read {text!r} as a memory size: write for example 24GiB or 80GB") from None
