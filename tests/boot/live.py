"""A machine for a person: what it goes through, while it does, and its console in their terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from typing import Final

from tests.boot.machine import PHASES, Line, Machine

LEAVE: Final = b"\x1d"
"""Ctrl and ]."""

_TOLD: Final = {
    "kernel": "the firmware has measured and started the kernel",
    "initramfs": "the kernel runs the initramfs",
    "unlock": "Kagimori starts, before anything could ask for a passphrase",
    "answer": "evidence is collected: report, manifest, quote, event log",
    "opened": "the key has opened the encrypted root",
    "login": "the machine is up: its login prompt is there",
}
_OWN: Final = re.compile(r"kagimori|FAILS|expected:|found:|Welcome to|reboot: Power down")
_POLL_S: Final = 0.2


@contextlib.contextmanager
def watched(machine: Machine, say: Callable[[str], None]) -> Iterator[None]:
    """Tell what a machine goes through until the block ends: its phases, and what Kagimori says on its console."""
    ended = threading.Event()

    def watch() -> None:
        told: set[str] = set()
        seen = 0
        while True:
            last = ended.wait(_POLL_S)
            lines = list(machine.lines)
            unfinished = machine.unfinished
            for line in lines[seen:]:
                _tell(line, told, say)
            seen = len(lines)
            if unfinished is not None and re.search(dict(PHASES)["login"], unfinished.text):
                _tell(unfinished, told, say)
            if last:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell(line: Line, told: set[str], say: Callable[[str], None]) -> None:
    for name, pattern in PHASES:
        if name in _TOLD and name not in told and re.search(pattern, line.text):
            told.add(name)
            say(f"{line.at_s:6.1f} s  {_TOLD[name]}")
    if _OWN.search(line.text) and line.text.isprintable():
        say(f"          | {line.text}")


def hand_over(machine: Machine) -> None:
    """Connect this terminal with the machine's console until that is off, or the person leaves."""
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    before = termios.tcgetattr(keyboard)
    machine.heard = lambda data: _write(screen, data)
    tty.setraw(keyboard)
    try:
        machine.type_raw(b"\r")  # for a fresh prompt
        while machine.qemu.poll() is None:
            ready, _, _ = select.select([keyboard], [], [], _POLL_S)
            keys = os.read(keyboard, 1024) if ready else b""
            if (ready and not keys) or LEAVE in keys:
                return
            with contextlib.suppress(BrokenPipeError):  # it has just gone off
                machine.type_raw(keys)
    finally:
        machine.heard = None
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
