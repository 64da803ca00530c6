"""One H100 in numbers: what turns counted launches, bytes and FLOPs into seconds.

Fitted to the 40 optimizer rows that one NVIDIA H100 80GB HBM3 measured on 2026-11-27 with torch 2.11 at commit 76a1e6c
of this project; ``benchmarks/results/h100-2026-11-27.json`` holds them. Predicted over measured, those rows are off by
7 % in the median and lie within 0.71 to 1.44. Operators timed on the same day, which were not fitted, are within 12 %
where the device is the limit, save ten Newton-Schulz steps in bfloat16 (1.14 to 1.23 of the measured time), and 0.8 to
2.0 where the host is: that host took anything from 12 to 27 microseconds for a launch.
"""

__all__ = [
    "BANDWIDTH",
    "CALL",
    "FLOOR",
    "LIST",
    "MORE",
    "RATE",
    "SMS",
    "STEP",
    "TILE",
    "VIEW",
    "WAIT",
]

STEP = 213e-6
"""Host seconds of a step, whatever it does."""
CALL = 24e-6
"""Host seconds of an operator that launches."""
VIEW = 3.5e-6
"""Host seconds of an operator that launches nothing."""
LIST = 2.3e-6
"""Host seconds of each tensor in a list."""
MORE = 7e-6
"""Host seconds of each further kernel of one operator."""
WAIT = 10e-6
"""Host seconds of a synchronisation, besides the waiting."""
FLOOR = 2.5e-6
"""Device seconds of the least kernel."""
BANDWIDTH = 2.75e12
"""Bytes a second."""
RATE = {"float64": 50e12, "float32": 50e12, "tf32": 330e12, "bfloat16": 600e12, "float16": 600e12}
"""FLOPs a second of products, by the kind of their operands."""
TILE, SMS = 128 * 64, 132
"""Entries that one thread block computes of a product, and how many blocks run at once: a
product of few tiles fills only part of the device."""
