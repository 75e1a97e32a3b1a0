"""What a signal does to a process that still imports; it imports nothing slow itself."""

import os
import signal


def ending() -> list[int]:
    """The signals that end a command: Ctrl-C's, a system's, a closed terminal's (but under nohup)."""
    hung_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def end_at_signals() -> None:
    """End at once, without a traceback: until `console.main` takes over there is nothing to clean up."""
    for number in ending():
        signal.signal(number, lambda number, _: os._exit(128 + number))
