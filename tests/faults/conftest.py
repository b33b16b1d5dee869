"""Fixtures of the faults: the launcher, VMs that live as long as the run, verifiers that live as long as a story."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.desks import logs_of_its_own
from tests.worlds import amd, enrolled, enrolled_direct, new_verifier, office, owner, volume

from kagimori_protocol.messages import Kind
from kagimori_simulator import disk
from kagimori_simulator.amd import AmdRoot

pytest.register_assert_rewrite(
    "tests.faults.boots", "tests.faults.guests", "tests.faults.invariants", "tests.attacks.attacker"
)

from tests.attacks.attacker import UNLOCK_KEY, UUID  # noqa: E402 - after its asserts may be rewritten
from tests.faults.boots import Boot, booted  # noqa: E402 - as above
from tests.faults.guests import Guest, running  # noqa: E402 - as above
from tests.faults.programs import Launcher  # noqa: E402 - as above

__all__ = [
    "amd",
    "enrolled",
    "enrolled_direct",
    "logs_of_its_own",
    "new_verifier",
    "office",
    "owner",
    "volume",
]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Give the process that starts programs."""
    with Launcher.running(tmp_path_factory.mktemp("programs")) as running_launcher:
        yield running_launcher


@pytest.fixture(scope="session")
def guests(
    tmp_path_factory: pytest.TempPathFactory, new_verifier: Path, amd: AmdRoot
) -> Iterator[dict[Kind, Guest]]:
    """Keep the VMs of the run, by kind, as they are asked for."""
    with ExitStack() as stack:
        yield _Guests(stack, tmp_path_factory.mktemp("guests"), new_verifier, amd)


class _Guests(dict[Kind, Guest]):
    def __init__(self, stack: ExitStack, directory: Path, new: Path, root: AmdRoot) -> None:
        super().__init__()
        self._stack = stack
        self._places = (directory, new, root)

    def __missing__(self, kind: Kind) -> Guest:
        directory, new, root = self._places
        guest = self[kind] = self._stack.enter_context(running(kind, directory / kind, new, root))
        return guest


@pytest.fixture
def guest(guests: dict[Kind, Guest], request: pytest.FixtureRequest) -> Guest:
    """Give the VM of the kind that a test is about; below an SVSM unless it says otherwise."""
    return guests[getattr(request, "param", "svsm-vtpm")]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the disk of the VMs: a LUKS2 volume whose keyslot takes the unlock key. Nobody writes to it."""
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    disk.make_volume(path, UNLOCK_KEY)
    subprocess.run(["cryptsetup", "luksUUID", "--batch-mode", "--uuid", UUID, path], check=True)
    disk.seal(path, UNLOCK_KEY)
    return path


@pytest.fixture
def boot(launcher: Launcher, guest: Guest, amd: AmdRoot, image: Path, tmp_path: Path) -> Iterator[Boot]:
    """Boot the VM of the kind that a test is about."""
    with booted(launcher, guest, amd, image, tmp_path) as running_boot:
        yield running_boot
