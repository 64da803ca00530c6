"""transformers, imported without its progress bars and notices."""

import os
from typing import Any

__all__ = ["quiet_transformers"]


def quiet_transformers() -> Any:
    """The transformers package, without network and messages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
