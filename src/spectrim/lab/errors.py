"""Errors and warnings for the user of the lab.

Every message is one line that names the value and the choices; the command line prints it as such.
"""

import signal

__all__ = ["Interrupted", "LabError", "LabWarning"]


class LabError(ValueError):
    """The user's input is wrong; the message is one line."""


class LabWarning(UserWarning):
    """Something was skipped or has changed; the message is one line."""


class Interrupted(Exception):  # noqa: N818 - no error, named like KeyboardInterrupt
    """A signal asked the process to end; finished work is kept.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.number = number
