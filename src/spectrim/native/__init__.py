"""Kernels in C for the host's processor, for what takes torch several passes over memory.

They are compiled at their first use, where the system has a C compiler. Everything works without them: each has its
eager form beside its caller, which is also what accelerators and compiled graphs take. Relied on by the operators and
by ``optim``; relies on torch alone.
"""

from .library import available, unavailable_because

__all__ = ["available", "unavailable_because"]
