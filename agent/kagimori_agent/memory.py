"""Keep secrets out of swap and core dumps.

Best effort, and said so: keys travel as ``bytes``, which Python copies and cannot wipe. What is kept is that none gets
where something else would store it; references go as soon as they have served (docs/threat-model.md).

Import budget: ``ctypes``, ``resource`` and the error tree.
"""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

from kagimori_protocol.errors import ImageError

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
