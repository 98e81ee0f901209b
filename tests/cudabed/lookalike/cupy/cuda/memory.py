"""As cupy.cuda.memory."""

from .._memory import MemoryPointer, MemoryPool, OutOfMemoryError, UnownedMemory  # noqa: F401
