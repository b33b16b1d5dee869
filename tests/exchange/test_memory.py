"""What of an unlock key is left in the agent's own memory once its volumes are open (THREATS T17).

The agent ends right afterwards, and its memory with it. But Python does not wipe what it frees, so this looks: the real
program, held just before its end, is searched from outside as root of the guest could.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.exchange.test_secrets import forms
from tests.worlds import Enrolled

pytestmark = pytest.mark.slow

HELD = """
import sys
from kagimori_agent import cli, luks
kept = []
if sys.argv[1] == "keep":
    opened = luks.open_volume
    def open_volume(volume, key, **rest):
        kept.append(bytes(key))
        return opened(volume, key, **rest)
    luks.open_volume = open_volume
code = cli.main(["unlock", "--prove", "--config", sys.argv[2]])
print("ended", code, flush=True)
sys.stdin.read()
"""
LONGEST = 1 << 20


def search(pid: int, secret: bytes) -> dict[str, int]:
    """Count the forms of a secret in all writable memory of a process."""
    found: dict[str, int] = {}
    with (
        Path(f"/proc/{pid}/maps").open(encoding="ascii") as maps,
        Path(f"/proc/{pid}/mem").open("rb", 0) as memory,
    ):
        for line in maps:
            span = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if span is None:
                continue
            start, end = (int(edge, 16) for edge in span.groups())
            content = b""
            for at in range(start, end, LONGEST):
                memory.seek(at)
                try:
                    content += memory.read(min(LONGEST, end - at))
                except OSError:
                    break  # a page that is not there
            for form, pattern in forms(secret).items():
                if count := content.count(pattern):
                    found[form] = found.get(form, 0) + count
    return found


def left(enrolled: Enrolled, mode: str) -> dict[str, int]:
    """Run the agent in a VM up to its end, and search it."""
    with enrolled.booted() as (world, _):
        command = [sys.executable, "-c", HELD, mode, str(world.directory / "agent.toml")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
            assert agent.stdout is not None
            said = next(iter(agent.stdout.readline, ""), "")
            while said and not said.startswith("ended"):
                said = agent.stdout.readline()
            assert said == "ended 0\n"
            return search(agent.pid, enrolled.unlock_key)


def test_the_search_finds_a_key_that_is_held(enrolled: Enrolled) -> None:
    """Or the next test would say nothing."""
    assert left(enrolled, "keep").get("raw", 0) >= 1


def test_of_a_key_that_was_used_little_is_left_before_the_agent_ends(enrolled: Enrolled) -> None:
    """What Python has freed is not wiped: the decrypted answer, with the key in base64, is found once or twice."""
    found = left(enrolled, "drop")
    assert all(count <= 2 for count in found.values()), found
    assert found.get("raw", 0) <= 1


def test_no_process_that_goes_on_has_the_key(enrolled: Enrolled) -> None:
    """The agent has ended, and with it its memory; the TPM and whatever else it talked to never had the key."""
    with enrolled.booted() as (world, _):
        command = [sys.executable, "-m", "kagimori_agent", "unlock", "--prove", "--config"]
        done = subprocess.run(
            [*command, str(world.directory / "agent.toml")], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        children = (
            Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text(encoding="ascii").split()
        )
        others = {int(pid) for pid in children}
        assert others, "a swtpm at least"
        assert {pid: search(pid, enrolled.unlock_key) for pid in others} == {pid: {} for pid in others}
