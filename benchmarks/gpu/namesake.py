"""Lets NVIDIA's package "cuda", which torch imports, be found beside the script benchmarks/cuda.py."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

__all__ = ["stand_back"]


def stand_back(name: str, file: str) -> None:
    """Put the module of this name that would have been found without the file's folder in its place.

    Raises:
        ModuleNotFoundError: there is none.
    """
    folder = Path(file).resolve().parent
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != folder]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)
