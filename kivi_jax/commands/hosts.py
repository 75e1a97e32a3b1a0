"""`--distributed`: one command, started on every host, computes on the devices of all.

The hosts find each other as JAX does it: through a cluster's manager (Slurm, Open MPI, Kubernetes), or by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Each does the same; the first also prints and
writes.
"""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kivi_jax.console import fail, out_of_memory, status
from kivi_jax.outputs import seal

HEARTBEAT_SECONDS = 10  # a host that is not heard for so long has died
LOST = "another host has ended, or cannot be reached: start the command again on all of them"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within, JAX computes on the devices of all hosts; what others than the first print is dropped.

    Whoever fails, or misses another, ends at once and says why: waiting for the others would not end.

    Raises:
        ValueError: the environment does not say which hosts there are.
    """
    import jax

    errors = os.dup(2)
    _silence_libraries()

    def end(reason: str) -> None:
        sys.stderr = os.fdopen(errors, "w")
        fail(reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    # JAX notices in a thread of its own that a host is gone or was never there, and aborts the process.
    aborted, libc = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: end(LOST)), ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, aborted)
    try:
        _find_others()
        if jax.process_index() != 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("KIVI_JAX_TRACEBACK"):
            os.write(errors, traceback.format_exc().encode())
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        end(out_of_memory(error) or (LOST if lost else str(error)))
    finally:
        libc.signal(signal.SIGABRT, None)


def _find_others() -> None:
    import jax

    number, count = (os.environ.get(f"JAX_{name}") for name in ("PROCESS_ID", "NUM_PROCESSES"))
    try:
        with status("waiting for the other hosts"):
            jax.distributed.initialize(
                process_id=None if number is None else int(number),
                num_processes=None if count is None else int(count),
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the hosts are not known ({error}): set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID, or start the command by Slurm or mpirun"
        ) from error


def _silence_libraries() -> None:
    """What Python prints stays; what libraries print below it about connections is dropped."""
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w") for fd in (1, 2))
    with open(os.devnull, "w") as nothing:
        for fd in (1, 2):
            os.dup2(nothing.fileno(), fd)


def for_this_host(destination: Path) -> Path:
    """The file that this host writes: the first one's own, others' a copy of what the first has by now."""
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    first = jax.process_index() == 0
    known = destination.read_bytes() if first and destination.exists() else b""
    size = int(broadcast_one_to_all(np.int32(len(known))))
    sent = np.frombuffer(known, np.uint8) if known else np.zeros(size, np.uint8)
    content = np.asarray(broadcast_one_to_all(sent)).tobytes()
    if first:
        return destination
    own = Path(tempfile.mkdtemp()) / destination.name
    if content:
        own.write_bytes(content)
    return own


def agree(settings: dict[str, Any]) -> None:
    """Refuse to begin where one host would compute with something else than the others.

    Raises:
        ValueError: what answers depend on, with marks of the files' contents, is not the same on all hosts.
    """
    import jax
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return
    mark = np.frombuffer(seal(settings).encode(), np.uint8)
    if (process_allgather(mark) != mark).any():
        raise ValueError(
            "the hosts were given different options, or files that differ by content: start the same command "
            "on all of them, with the same input and prefix"
        )
