"""Handles Ctrl-C and SIGTERM: the first signal ends a run after its step, the second ends the process at once."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context manager that remembers the first signal instead of ending the process.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self, *, told: bool = True) -> None:
        """``told`` says on stderr what the signal has done."""
        self._told = told
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.number = number
        # Restore the system's own handling, which works even in the middle of a long operation.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._told:
            return
        # A progress bar hides the cursor: show it, since the next signal ends the process at once.
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        message = f"{signal.Signals(number).name}: ending after this step with a checkpoint; once more ends at once"
        # os.write, not print: the signal may have interrupted a write to the same stream.
        os.write(2, f"{show_cursor}spectrim: {message}\n".encode())
