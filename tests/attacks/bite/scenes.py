"""The VMs that bite stories play on: TPMs that are started once, and for each story a fresh owner and a fresh machine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID
from tests.attacks.bite.story import Scene, Stand, Story
from tests.attacks.lies import GOVERNED
from tests.worlds import CHIP_ID, DIRECT, SVSM, Owner, enrol_direct_vm, enrol_vm_below_svsm

from kagimori_agent.cap import CAP_DATA
from kagimori_agent.devices.vtpm import open_vtpm
from kagimori_protocol import tpm
from kagimori_simulator import measured_boot, pe
from kagimori_simulator.amd import AmdRoot, Vek
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm
from kagimori_verifier.appraise.policy import BootWay

BOOTS: dict[str, MeasuredBoot] = {
    "honest": measured_boot.grub(),
    "evil": measured_boot.grub(kernel=pe.image({".text": b"an attacker's kernel"})),
    "capped": measured_boot.grub(),
    "uki": measured_boot.uki(),
    "agent": measured_boot.grub(),
    "doors": measured_boot.grub(cmdline=f"{measured_boot.CMDLINE} systemd.import_credentials=yes"),
}

Stands = Callable[[str], tuple[Stand, dict[str, Any]]]


@pytest.fixture(scope="session")
def stands(tmp_path_factory: pytest.TempPathFactory, amd: AmdRoot) -> Iterator[Stands]:
    """Give the TPMs that stories share, each started when it is first asked for."""
    started: dict[str, tuple[Stand, dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:

        def start(where: str) -> tuple[Stand, dict[str, Any]]:
            if where not in started:
                vtpm = stack.enter_context(Vtpm.start(tmp_path_factory.mktemp(where)))
                vtpm.play(BOOTS[where])
                svsm = Svsm(SnpMachine(amd, chip_id=CHIP_ID, svsm=True, measurement=SVSM), vtpm)
                opened = stack.enter_context(open_vtpm(tcti=vtpm.tcti, event_log=vtpm.event_log_path))
                stand = Stand(svsm, opened, None if where == "agent" else opened.make_keys())
                kept: dict[str, Any] = {}
                if where == "capped":
                    kept["quote"] = opened.quote(bytes(32), tpm.pcr_selection((*GOVERNED, 15)))
                    opened.measure(15, CAP_DATA)
                started[where] = stand, kept
            return started[where]

        yield start


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    office: Owner,
    stands: Stands,
    veks: dict[tuple[str, bytes, bytes, str], Vek],
) -> Scene:
    """Give the VM of a story, as its owner has enrolled it."""
    story: Story = request.getfixturevalue("story")
    direct = story.where == "direct"
    measurement = DIRECT if direct else SVSM
    machine = SnpMachine(
        office.root, chip_id=CHIP_ID, svsm=not direct, measurement=measurement, report_version=3
    )
    machine._veks = veks
    if direct:
        enrol_direct_vm(office, UUID, UNLOCK_KEY)
        return Scene(office, machine, "direct")
    profile: BootWay = "uki" if story.where == "uki" else "grub"
    accepted = BOOTS[story.where if story.where in {"uki", "doors"} else "honest"]
    enrol_vm_below_svsm(office, UUID, UNLOCK_KEY, profile, accepted)
    stand, kept = stands(story.where)
    svsm = copy.copy(stand.svsm)
    svsm.machine = machine
    return Scene(office, machine, profile, svsm, stand, kept)
