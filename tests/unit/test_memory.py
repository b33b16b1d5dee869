"""Secrets reach neither swap nor core dumps."""

from __future__ import annotations

import subprocess
import sys


def _in_a_process_of_its_own(code: str) -> str:
    """Run code that changes its whole process, and give what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_after_forbidding_core_dumps_neither_we_nor_our_children_leave_one() -> None:
    """The limit is inherited by cryptsetup; the process itself is marked as not to be dumped."""
    printed = _in_a_process_of_its_own(
        "import ctypes, resource, subprocess\n"
        "from kagimori_agent.memory import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
        "print(subprocess.run(['sh', '-c', 'ulimit -Hc'], capture_output=True, text=True).stdout)\n"
    )
    assert printed.split("\n") == ["(0, 0) 0", "0"]


def test_locked_memory_is_really_locked() -> None:
    """What the kernel says agrees with what the function returned."""
    printed = _in_a_process_of_its_own(
        "import re\n"
        "from kagimori_agent.memory import lock_memory\n"
        "locked = lock_memory()\n"
        "status = open('/proc/self/status').read()\n"
        "print(locked == (int(re.search(r'VmLck:\\s+(\\d+)', status)[1]) > 0))\n"
    )
    assert printed == "True"


def test_under_a_limit_memory_is_not_locked_so_that_allocations_still_work() -> None:
    """Locking what comes under a limit would turn a later allocation into a failed boot."""
    printed = _in_a_process_of_its_own(
        "import resource\n"
        "from kagimori_agent import memory\n"
        "def refuse(*_): raise ValueError('not allowed to raise maximum limit')\n"
        "resource.setrlimit = refuse\n"
        "print(memory.lock_memory())\n"
    )
    assert printed == "False"
