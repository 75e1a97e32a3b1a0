"""What every command shares: how errors end, and how bytes and tables look."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status


def run(app: Callable[[], Any]) -> None:
    """Run a command line; a user's mistake becomes one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half-written stays
    try:
        app()
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("KIVI_JAX_TRACEBACK"):  # for reporting a bug
            raise
        message = escape(" ".join(str(error).split()))  # a path may look like rich's markup: model[/a]
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {message}", highlight=False)
        sys.exit(2)


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
