"""Secrets leave no copies where somebody would find them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

from kagimori_agent.memory import Secret
from kagimori_protocol.errors import UsageError

KEY = bytes(range(1, 33))


def _in_a_process_of_its_own(code: str) -> str:
    """Run code that changes its whole process, and give what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_secret_is_wiped_where_it_is_on_leaving_its_block() -> None:
    """A view that was handed out shows zeros too: there is one copy, and it is gone."""
    with Secret(KEY) as secret:
        view = secret.view
        assert view == KEY
    assert bytes(view) == bytes(32)
    assert len(view) == 32


def test_a_secret_is_wiped_when_its_block_fails() -> None:
    """An error on the way is when a key would otherwise stay behind."""
    secret = Secret(KEY)
    view = secret.view
    with pytest.raises(RuntimeError), secret:
        raise RuntimeError
    assert bytes(view) == bytes(32)


def test_a_wiped_secret_does_not_pass_for_a_key_of_zeros() -> None:
    """Opening a disk with 32 zeros would be a key that everybody knows."""
    secret = Secret(KEY)
    secret.wipe()
    secret.wipe()
    with pytest.raises(UsageError) as caught:
        _ = secret.view
    assert caught.value.code == "memory.wiped"


def test_a_view_cannot_change_the_secret() -> None:
    """Whoever borrows a key does not own it."""
    view = Secret(KEY).view
    with pytest.raises(TypeError):
        view[0] = 0


def test_the_callers_bytes_are_left_alone() -> None:
    """A bytearray that is somebody else's is not wiped behind their back."""
    data = bytearray(KEY)
    Secret(data).wipe()
    assert data == KEY


def test_no_text_shows_a_secret() -> None:
    """Not even in a traceback with local variables."""
    secret = Secret(KEY)
    texts = (repr(secret), str(secret), f"{secret}", f"{[secret]!r}", f"{secret!a}")
    assert set(texts) == {"Secret(...)", "[Secret(...)]"}


def test_a_secret_is_neither_pickled_nor_copied() -> None:
    """Each of these would make a copy that nobody wipes."""
    secret = Secret(KEY)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(secret)


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
