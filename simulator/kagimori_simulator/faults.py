"""Named lies: what a hostile host, a hostile guest or a broken machine would do to one part of a simulated world.

Each function bends the object that it is given and says which row of THREATS.md it plays. Lies compose: call several.
What is no lie but another truth (another kernel, another command line) is a part given to ``measured_boot`` instead.
"""

from __future__ import annotations

import secrets
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from kagimori_protocol import certificate_table
from kagimori_protocol.snp import CHIP_ID_SIZE, FIELDS, TURIN_HWID_SIZE, VMPL_HOST_REQUESTED
from kagimori_protocol.tpm import EK_TEMPLATE_L1, EK_UNIQUE_SIZE
from kagimori_simulator.amd import Vek
from kagimori_simulator.event_log import EventType, MeasuredBoot, same
from kagimori_simulator.machine import GUEST_VMPL_UNDER_SVSM

if TYPE_CHECKING:
    from kagimori_simulator.configfs import ConfigfsTsm, ReportItem
    from kagimori_simulator.machine import SnpMachine
    from kagimori_simulator.sev_guest import SevGuest
    from kagimori_simulator.svsm import Svsm
    from kagimori_simulator.vtpm import Vtpm

POLICY_MIGRATE_MA: Final = 1 << 18
POLICY_DEBUG: Final = 1 << 19

VMM_GENERIC: Final = 1 << 31
"""SNP_GUEST_VMM_ERR_GENERIC of Linux's KVM: the host's "no" without a reason."""
THROTTLED_S: Final = 5
_RESPONSE_HEADER_SIZE: Final = 0x20

# The machine and what it launched


def another_measurement(machine: SnpMachine) -> None:
    """T11: the host launches something else than the SVSM that the owner knows; all the rest is genuine."""
    machine.measurement = bytes(byte ^ 0xFF for byte in machine.measurement)


def debug_policy(machine: SnpMachine) -> None:
    """T14: the host launches the guest so that it may read the guest's memory."""
    machine.policy |= POLICY_DEBUG


def migration_policy(machine: SnpMachine) -> None:
    """T14: the host launches the guest so that a migration agent may move it."""
    machine.policy |= POLICY_MIGRATE_MA


def host_requested_report(machine: SnpMachine) -> None:
    """T11: the report was asked for by the host, not by the guest (VMPL 0xFFFFFFFF)."""
    machine.overrides["vmpl"] = VMPL_HOST_REQUESTED


def old_firmware(machine: SnpMachine) -> None:
    """T12: the platform runs, and is attested with, firmware from before every fix (all parts at 0)."""
    machine.reported_tcb = machine.current_tcb = machine.committed_tcb = machine.launch_tcb = bytes(8)


def unsigned_report(machine: SnpMachine) -> None:
    """The firmware does not sign: KEY_INFO says SIGNING_KEY "none", the signature is zero."""
    machine.signer = "none"


def signed_by_nobody(machine: SnpMachine) -> None:
    """Somebody made the report up and signed it with a key of his own; the certificates are the real ones."""
    machine.impostor = Vek(b"", ec.generate_private_key(ec.SECP384R1()))


# Certificates


def wrong_chip(machine: SnpMachine) -> None:
    """T7: the report names another chip than the certificate of the key that signed it."""
    machine.overrides["chip_id"] = _another_chip(machine)


def wrong_tcb(machine: SnpMachine) -> None:
    """T12: the report claims a better REPORTED_TCB than the certificate of the key that signed it."""
    better = bytearray(machine.reported_tcb)
    better[7] ^= 1
    machine.overrides["reported_tcb"] = bytes(better)


def swapped_certificate(machine: SnpMachine) -> None:
    """T7: the host hands out another chip's certificate, genuine in itself."""
    other = machine.root.vcek(_another_chip(machine), machine.reported_tcb)
    machine.certificates = {**machine.chain(), certificate_table.VCEK: other.certificate_der}


def no_certificates(machine: SnpMachine) -> None:
    """T24: the host hands out no certificates at all."""
    machine.certificates = {}


def too_many_certificates(machine: SnpMachine) -> None:
    """T24: the host hands out more than the 16 KiB that Linux asks for in a plain report."""
    machine.certificates = {**machine.chain(), certificate_table.CRL: bytes(0x4000)}


def revoked_intermediate(machine: SnpMachine) -> None:
    """T15: AMD has revoked the ASK and the ASVK; the host, for once honest, hands out the list, too."""
    root = machine.root
    serials = [authority.certificate.serial_number for authority in (root.ask, root.asvk)]
    machine.certificates = {**machine.chain(), certificate_table.CRL: root.crl(serials)}


# SVSM and vTPM


def guest_level_report(svsm: Svsm) -> None:
    """T11: a guest kernel plays SVSM: everything is well formed, but its report can only say VMPL 2."""
    svsm.vmpl = GUEST_VMPL_UNDER_SVSM


def forged_ek(svsm: Svsm, other: Vtpm) -> None:
    """T9: the manifest vouches for the EK of another TPM."""
    svsm.manifest = other.ek_public()


def software_ek(svsm: Svsm) -> rsa.RSAPrivateKey:
    """T9: the manifest vouches for an EK whose private key the attacker holds; returns it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=EK_UNIQUE_SIZE * 8)
    modulus = key.public_key().public_numbers().n.to_bytes(EK_UNIQUE_SIZE, "big")
    svsm.manifest = EK_TEMPLATE_L1[:-EK_UNIQUE_SIZE] + modulus
    return key


def clone_vtpm(state: Path, copy: Path) -> None:
    """T9: the seeds of a vTPM (started with ``state``) are copied; ``Vtpm.start(..., state=copy)`` runs the clone."""
    shutil.copytree(state, copy, ignore=shutil.ignore_patterns(".lock"))


# The event log


def unlogged_extend(vtpm: Vtpm, pcr: int) -> None:
    """T22: a PCR moves and the log does not say why."""
    vtpm.extend(pcr, secrets.token_bytes(32))


def extra_logged_event(vtpm: Vtpm, boot: MeasuredBoot, pcr: int = 8) -> None:
    """T22: the log of a boot already played tells of an event that never reached the TPM."""
    event = same(pcr, EventType.IPL, b"grub_cmd: never ran\x00")
    lie = MeasuredBoot(boot.way, (*boot.events, event), boot.startup_locality)
    vtpm.write_event_log(lie.event_log(vtpm.banks()))


def missing_event(vtpm: Vtpm, boot: MeasuredBoot, pcr: int) -> None:
    """T22: the log of a boot already played leaves out what came last in one PCR. Raises UsageError if nothing did."""
    last = [event for event in boot.events if event.pcr == pcr][-1:]
    lie = boot.changed(lambda event: any(event is each for each in last), lambda _: None)
    vtpm.write_event_log(lie.event_log(vtpm.banks()))


def truncated_log(vtpm: Vtpm, missing: int = 1) -> None:
    """T22: the log ends ``missing`` bytes early, inside an event."""
    vtpm.write_event_log(vtpm.event_log_path.read_bytes()[:-missing])


# The kernel's door


def stale_generation(tsm: ConfigfsTsm) -> None:
    """Another program writes to the same request after each outblob is read, so that what follows belongs to its data."""

    def interfere(item: ReportItem, name: str) -> None:
        if name == "outblob":
            item.store("inblob", secrets.token_bytes(64))

    tsm.after_show = interfere


# The driver behind it and behind /dev/sev-guest, and what the host does with its messages


def throttling_host(driver: SevGuest, seconds: float = THROTTLED_S) -> None:
    """The host is busy for a while; the driver waits, and gives its key up if that takes too long."""
    driver.busy_until = time.monotonic() + seconds


def silent_host(driver: SevGuest) -> threading.Event:
    """The host never comes back with an answer, until the event is set that this returns."""
    driver.stalled = threading.Event()
    return driver.stalled


def failing_host(driver: SevGuest, vmm_error: int = VMM_GENERIC) -> None:
    """The host refuses to pass messages on; the first one costs the key."""
    driver.vmm_error = vmm_error


def garbled_answers(driver: SevGuest) -> None:
    """The host changes an answer of the firmware on its way; that costs the key, too."""
    driver.garbles = True


def wiped_key(driver: SevGuest) -> None:
    """Something failed earlier in this boot, so that there is no key any more."""
    driver.wiped = True


def insatiable_host(driver: SevGuest, pages: int = 2) -> None:
    """The host says that it needs these pages for certificates, and takes no buffer whatever its size."""
    driver.needs_pages = pages


def report_of_another_size(driver: SevGuest, size: int = 0x4A8) -> None:
    """The firmware announces a report of a size that no report has."""
    driver.bend = lambda response: response[:4] + struct.pack("<I", size) + response[8:]


def report_of_other_data(driver: SevGuest) -> None:
    """The kernel hands out the answer to somebody else's request."""
    driver.bend = lambda response: _bent(response, "report_data")


def report_of_another_vmpl(driver: SevGuest) -> None:
    """The kernel hands out an answer of another level."""
    driver.bend = lambda response: _bent(response, "vmpl")


def _bent(response: bytes, name: str) -> bytes:
    """Flip the lowest bit of a field of the report in a MSG_REPORT_RSP."""
    at = _RESPONSE_HEADER_SIZE + FIELDS[name].offset
    return response[:at] + bytes([response[at] ^ 1]) + response[at + 1 :]


def _another_chip(machine: SnpMachine) -> bytes:
    size = TURIN_HWID_SIZE if machine.product == "Turin" else CHIP_ID_SIZE
    return bytes(byte ^ 0xFF for byte in machine.chip_id[:size]).ljust(CHIP_ID_SIZE, b"\x00")
