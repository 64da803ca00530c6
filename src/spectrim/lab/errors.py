"""What the lab tells its user, beside results: what can be mended, what was passed over, and that it was stopped.

Every message is one line that names the value and the choices; the command line prints it as such.
"""

import signal

__all__ = ["Interrupted", "LabError", "LabWarning"]


class LabError(ValueError):
    """Input that cannot be served, told in one line."""


class LabWarning(UserWarning):
    """Something that was passed over and that a user should know, told in one line."""


class Interrupted(Exception):  # noqa: N818 - it is no error, and named as KeyboardInterrupt is
    """A signal asked the process to end, and nothing that was done is lost.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.number = number
