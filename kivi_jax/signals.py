"""What a signal does to a process that still imports; it imports nothing slow itself."""

import os
import signal


def end_at_signals() -> None:
    """End at once, without a traceback: until `console.main` takes over there is nothing to clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
