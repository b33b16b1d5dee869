"""Prey for the stories: enrolled VMs on machines that the attacker has in its hands, and verifiers to be deceived."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.worlds import (
    CHIP_ID,
    DIRECT,
    SVSM,
    Owner,
    amd,
    enrol_direct_vm,
    enrol_grub_vm,
    enrolled,
    make_verifier,
    new_verifier,
    office,
    owner,
    volume,
)

from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot, Vek
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

pytest.register_assert_rewrite("tests.attacks.attacker", "tests.attacks.bite", "tests.attacks.lies")

from tests.attacks.attacker import UNLOCK_KEY, UUID, Prey, closing  # noqa: E402 - after its asserts may be rewritten
from tests.attacks.bite.scenes import scene, stands  # noqa: E402 - as above

__all__ = ["amd", "enrolled", "new_verifier", "office", "owner", "scene", "stands", "volume"]


@pytest.fixture(scope="session")
def other_verifier(tmp_path_factory: pytest.TempPathFactory, amd: AmdRoot) -> Path:
    """Give the directory of a second verifier, with keys of its own, to be copied."""
    directory = tmp_path_factory.mktemp("other") / "verifier"
    make_verifier(directory, amd)
    return directory


@pytest.fixture
def neighbour(tmp_path: Path, other_verifier: Path, amd: AmdRoot) -> Iterator[Owner]:
    """Give another owner's verifier, which knows a VM of the same name and with the same image."""
    directory = tmp_path / "neighbour"
    shutil.copytree(other_verifier, directory)
    with Owner.opened(directory, amd) as owner:
        enrol_grub_vm(owner, UUID, b"the neighbour's unlock key ....".ljust(32, b"."))
        yield owner


@pytest.fixture(scope="session")
def veks() -> dict[tuple[str, bytes, bytes, str], Vek]:
    """Keep the certificates of all machines' keys, as hosts do: each costs a signature of RSA-4096."""
    return {}


@pytest.fixture
def prey(tmp_path: Path, office: Owner, veks: dict[tuple[str, bytes, bytes, str], Vek]) -> Iterator[Prey]:
    """Give the VM ``web1`` below an SVSM, whose honest GRUB boot its owner has accepted, and which has booted so."""
    enrol_grub_vm(office, UUID, UNLOCK_KEY)
    machine = SnpMachine(office.root, chip_id=CHIP_ID, svsm=True, measurement=SVSM, report_version=3)
    machine._veks = veks
    with Vtpm.start(tmp_path / "securityfs") as vtpm:
        vtpm.play(measured_boot.grub())
        with closing(Prey(office, machine, Svsm(machine, vtpm), vtpm)) as running:
            yield running


@pytest.fixture
def direct_prey(office: Owner, veks: dict[tuple[str, bytes, bytes, str], Vek]) -> Iterator[Prey]:
    """Give the VM ``web1`` without an SVSM: its measurement covers everything."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    machine = SnpMachine(office.root, chip_id=CHIP_ID, measurement=DIRECT, report_version=3)
    machine._veks = veks
    with closing(Prey(office, machine)) as running:
        yield running
