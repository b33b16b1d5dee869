"""requests comes without what guesses encodings, and without a word about that."""

from __future__ import annotations

import json
import subprocess
import sys

from kagimori_agent.lean import LEFT_OUT

PROGRAM = """
import json, sys
from kagimori_agent.lean import load_requests
load_requests()
load_requests()
import requests
response = requests.Response()
response._content = "käse".encode()
print(json.dumps([[name for name in sys.modules if name.startswith(("charset", "_codecs_", "chardet"))
    and sys.modules[name]], response.text]))
"""


def test_requests_loads_without_what_guesses_encodings() -> None:
    """And says nothing on a console where every line is for a person; a body that somebody reads as text is UTF-8."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[], "käse"]
    assert LEFT_OUT


EARLY = """
import socket
class Socket(socket.socket):
    def bind(self, address):
        raise OSError(99, "Cannot assign requested address")
real, socket.socket = socket.socket, Socket
from kagimori_agent.lean import load_requests
load_requests()
socket.socket = real
import requests, urllib3.util.connection
print(urllib3.util.connection.allowed_gai_family().name)
"""


def test_a_boot_whose_loopback_is_down_still_finds_its_verifier_by_ipv6() -> None:
    """urllib3 decides once, when it is loaded, by whether ::1 can be bound: in an initramfs that is before any address."""
    done = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "AF_UNSPEC\n"


WAITED_FOR = """
import sys
import kagimori_agent.cli, kagimori_agent.unlock, kagimori_agent.devices.vtpm
import kagimori_agent.devices.configfs_tsm, kagimori_agent.devices.sev_guest
from kagimori_agent.exchange import preload
preload()
print(*(name for name in sys.modules if sys.modules[name]), sep="\\n")
"""
NOT_WAITED_FOR = (
    "kagimori_protocol.snp",  # a class of 33 fields: a guest asks for a report, and does not read it
    "kagimori_protocol.luks2_change",
    "kagimori_agent.doctor",
    "kagimori_agent.enrol",
    "kagimori_agent.footprint",
    "kagimori_agent.host_doors",
    "kagimori_agent.reencrypt",
    "asyncio",
    "multiprocessing",
    "unittest",
    "xml",
    "cffi",
    "pycparser",
    *LEFT_OUT,
)


def test_a_boot_does_not_wait_for_modules_that_it_does_not_use() -> None:
    """Each of them was loaded once, or may be one day by an import that nobody looks at."""
    done = subprocess.run(
        [sys.executable, "-c", WAITED_FOR], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = done.stdout.split()
    assert "requests" in loaded
    assert [name for name in NOT_WAITED_FOR if name in loaded] == []
