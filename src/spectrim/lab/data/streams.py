"""Token streams: the tokens of one source, in one or several memory-mapped arrays, read in windows."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spectrim.lab.errors import LabError

__all__ = ["ArrayWriter", "TokenArray", "TokenStream", "token_dtype"]

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class TokenStream:
    """Consecutive arrays of tokens. A window lies in one array, so the last tokens of an array may be in none.

    Args:
        arrays: one-dimensional, memory-mapped: reading a window touches its pages only.
        weight: share in a mixture, relative to the other streams.
        vocabulary_size: an upper bound that every token is checked against; None for tokens of the lab itself.
        name: where the tokens are from, for messages.
    """

    def __init__(
        self, arrays: Sequence[TokenArray], *, weight: float = 1.0, vocabulary_size: int | None = None, name: str = ""
    ) -> None:
        self.arrays = tuple(arrays)
        self.weight = weight
        self.vocabulary_size = vocabulary_size
        self.name = name

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def windows(self, length: int) -> int:
        """The number of windows of ``length`` inputs and one further target."""
        return sum(windows_in(array, length) for array in self.arrays)

    def window(self, index: int, length: int) -> TokenArray:
        """The ``length + 1`` tokens of a window.

        Raises:
            LabError: one of them is not in the vocabulary.
        """
        for array in self.arrays:
            if index < (here := windows_in(array, length)):
                break
            index -= here
        tokens = array[index * length : (index + 1) * length + 1]
        if self.vocabulary_size is not None and (largest := int(tokens.max())) >= self.vocabulary_size:
            raise LabError(f"data {self.name} holds token {largest}, but its vocabulary_size is {self.vocabulary_size}")
        return tokens


def windows_in(array: TokenArray, length: int) -> int:
    # A target is the token after its input, and the last token has none.
    return max(0, (len(array) - 1) // length)


def token_dtype(vocabulary_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest unsigned integer type that holds every token."""
    return np.uint16 if vocabulary_size <= 2**16 else np.uint32


class ArrayWriter:
    """Appends tokens to a .npy file whose length is not known in advance."""

    def __init__(self, path: Path, dtype: type[np.uint16] | type[np.uint32]) -> None:
        self._file = path.open("w+b")
        self._dtype = np.dtype(dtype)
        self.count = 0
        self._write_header()
        self._start = self._file.tell()

    def append(self, tokens: Sequence[int]) -> None:
        """Write tokens behind the others."""
        self._file.write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self.count += len(tokens)

    def close(self) -> None:
        """Complete the header and force the file to disk."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start, "numpy pads headers so that a length can grow in place"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
