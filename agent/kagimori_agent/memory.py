"""Keep secrets out of swap, core dumps and texts, and wipe them when they have served.

Best effort, and said so: Python copies what it likes, and an initramfs has no swap. What is kept is that no secret
outlives its use by our own doing, and that none gets where something else would store it.

Import budget: ``ctypes``, ``resource`` and the error tree.
"""

from __future__ import annotations

import ctypes
import os
import resource
from types import TracebackType
from typing import Final, NoReturn, Self

from kagimori_protocol.errors import ImageError, UsageError

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_MCL_CURRENT: Final = 1  # asm-generic/mman.h
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4


def forbid_core_dumps() -> None:
    """See that neither this process nor its children leave a core dump. Raises ImageError if the kernel will not.

    PR_SET_DUMPABLE also keeps other processes of the same user from reading this one's memory; a child's own exec
    sets it back, which is why the limit, that a child inherits, is set too.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise ImageError(
            "Core dumps cannot be forbidden, so a crash could write keys to a disk.",
            code="memory.dumpable",
            expected="prctl(PR_SET_DUMPABLE, 0) to succeed",
            found=os.strerror(ctypes.get_errno()),
            todo="See what keeps prctl from the agent, such as a seccomp filter.",
        )


def lock_memory() -> bool:
    """Keep this process's memory out of swap; tell whether that was possible.

    Only without a limit on locked memory: under one, later allocations would fail, which is worse than swap that an
    initramfs does not have.
    """
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):  # not root
        return False
    flags = _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT  # on fault: stacks of threads are not filled for it
    locked: int = ctypes.CDLL(None, use_errno=True).mlockall(flags)
    return locked == 0


class Secret:
    """Bytes that are wiped on leaving the ``with`` block (or by ``wipe``), and that no text ever shows.

    The bytes given are copied; a caller's own copy stays the caller's to wipe.
    """

    __slots__ = ("_data", "_wiped")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data``."""
        self._data = bytearray(data)
        self._wiped = False

    @property
    def view(self) -> memoryview:
        """The bytes, read-only, without another copy. Raises UsageError once wiped: zeros must never pass for a key.

        A view that was taken earlier stays as long as it was and shows zeros.
        """
        if self._wiped:
            raise UsageError(
                "A secret was asked for after it was wiped.",
                code="memory.wiped",
                expected="a secret",
                found="zeros",
            )
        return memoryview(self._data).toreadonly()

    def wipe(self) -> None:
        """Overwrite the bytes with zeros, where they are; more than once does no harm."""
        self._data[:] = bytes(len(self._data))
        self._wiped = True

    def __enter__(self) -> Self:
        """Give this secret."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipe."""
        self.wipe()

    def __len__(self) -> int:
        """Size in bytes."""
        return len(self._data)

    def __repr__(self) -> str:
        """Show nothing, not even the size."""
        return "Secret(...)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a Secret is not pickled and not copied")
