"""The one exception for what a user can mend: a path, a name, a number.

Its message is one line that names the value and the choices; the command line prints it and exits with 2.
"""

__all__ = ["LabError"]


class LabError(ValueError):
    """Input that cannot be served, told in one line."""
