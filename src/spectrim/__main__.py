"""``python -m spectrim``."""

import sys

from spectrim.cli import main

if __name__ == "__main__":
    sys.exit(main())
