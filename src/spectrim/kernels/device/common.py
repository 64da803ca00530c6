"""Functions that kernels share: a program's block, loading, storing and rounding entries, shrinkage."""

import triton
import triton.language as tl

from ..table import ALIGNMENT

ALIGN = tl.constexpr(ALIGNMENT)


@triton.jit
def work_of(blocks, ALIGNED: tl.constexpr):
    """This program's tensor, matrix and first entry, and the number of entries to the end of its piece."""
    row = blocks + tl.program_id(0).to(tl.int64) * 3
    packed = tl.load(row)
    begin = tl.load(row + 1)
    left = tl.load(row + 2) - begin
    if ALIGNED:
        begin = tl.multiple_of(begin, ALIGN)
    return packed & 0xFFFFFFFF, packed >> 32, begin, left


@triton.jit
def pointer(table, index, begin, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a block of one tensor, from the table."""
    address = tl.load(table + index).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + begin


@triton.jit
def number(table, index):
    """A float64 of the table, as float32."""
    return tl.load(table + index).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def number_or_tensor(table, index, place):
    """A float64 of the table; or, if the table has an address at ``place``, the float32 scalar there."""
    address = tl.load(table + place)
    value = number(table, index)
    if address != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)))
    return value


@triton.jit
def entries(source, offsets, left, MASKED: tl.constexpr):
    """The entries of a block in float32, with zeros beyond its end."""
    if MASKED:
        loaded = tl.load(source + offsets, mask=offsets < left, other=0.0)
    else:
        loaded = tl.load(source + offsets)
    return loaded.to(tl.float32)


@triton.jit
def put(target, offsets, left, x, random, CHANCE: tl.constexpr, MASKED: tl.constexpr):
    """Store float32 entries in the target's dtype; bfloat16 is rounded stochastically with CHANCE, else to nearest."""
    rounded = narrowed(x, target.dtype.element_ty, random, CHANCE)
    if MASKED:
        tl.store(target + offsets, rounded, mask=offsets < left)
    else:
        tl.store(target + offsets, rounded)


@triton.jit
def narrowed(x, TYPE: tl.constexpr, random, CHANCE: tl.constexpr):
    """Convert float32 to another type; bfloat16 is rounded stochastically with CHANCE, else to nearest."""
    # Integer arithmetic gives the same rounding on all devices and in the interpreter.
    return to_bfloat16(x, random, CHANCE) if TYPE == tl.bfloat16 else x.to(TYPE)


@triton.jit
def to_bfloat16(x, random, CHANCE: tl.constexpr):
    """Round to bfloat16, the upper half of a float32, by adding to the lower half before it is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    if CHANCE:
        added = random & 0xFFFF
    else:
        added = ((bits >> 16) & 1) + 0x7FFF
    finite = (bits & 0x7F800000) != 0x7F800000
    # NaN stays NaN, even if its payload is in the lower half.
    other = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, bits)
    bits = tl.where(finite, bits + added, other)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mixed(x):
    """Same as ``rounding._mixed``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise(seed, step, begin, offsets, DRAW: tl.constexpr):
    """32 random bits for every entry, as :mod:`spectrim.kernels.rounding` defines them.

    DRAW: 0 or 1; the lanes LOW and HIGH are the lower and the upper half of draw 0.
    """
    key = mixed(step.to(tl.int64).to(tl.uint32) ^ seed.to(tl.uint32))
    key = mixed(mixed(key ^ (seed >> 32).to(tl.uint32)) + DRAW)
    other = mixed((begin >> 32).to(tl.uint32) + key)
    position = begin.to(tl.uint32) + offsets.to(tl.uint32)
    return mixed(mixed(position ^ key) ^ other)


@triton.jit
def shrink(y, tau, FORM: tl.constexpr):
    """Same as ``shrinking.shrunk_entries``; FORM 0 changes nothing, 1 to 3 number FORMS."""
    if FORM == 0:
        return y
    elif FORM == 3:
        return tl.minimum(tl.maximum(y, -tau, tl.PropagateNan.ALL), tau, tl.PropagateNan.ALL)
    else:
        ratio = y / tau
        if FORM == 1:
            # If the square overflows, the result is zero; the exact result is below 1e-19 τ.
            small = y / (1 + ratio * ratio)
        else:
            small = tl.where(tl.abs(ratio) > 1e8, tl.where(y < 0, -tau, tau), y / tl.sqrt_rn(1 + ratio * ratio))
        return tl.where(tau < 1.1754943508222875e-38, 0.0, small)


@triton.jit
def mean_of(old, new, share):
    """old + share (new − old), computed from the nearer end, so that a share of 1 gives exactly ``new``."""
    change = new - old
    return tl.where(share < 0.5, old + share * change, new - change * (1 - share))


@triton.jit
def minus_expm1(x):
    """1 − eˣ for a scalar x ≤ 0, accurate to float32's rounding also near zero."""
    series = 1 + x * (1 / 7) * (1 + x * (1 / 8) * (1 + x * (1 / 9)))
    series = 1 + x * (1 / 4) * (1 + x * (1 / 5) * (1 + x * (1 / 6) * series))
    series = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * series))
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))
