"""Lies that the stories of the steps and the bite test share: each bends one part of a world or of the evidence.

They add to ``kagimori_simulator.faults`` what only an attacker of the protocol would want.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from tests.attacks.attacker import Attacker, SoftwareAk, made_up_attest, quoted, t1_of
from tests.attacks.software import SoftwareTpm
from tests.worlds import CHIP_ID, Owner
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_RH, TPM2_ST, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_DIGEST,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_TK_HASHCHECK,
)

from kagimori_agent.devices.vtpm import Quote
from kagimori_protocol import certificate_table, messages
from kagimori_protocol.tpm import AK_REQUIRED
from kagimori_simulator import amd as simulated_amd
from kagimori_simulator import faults, measured_boot
from kagimori_simulator.amd import AmdRoot, Vek
from kagimori_simulator.machine import SnpMachine

GOVERNED: Final = (0, 1, 2, 3, 4, 5, 7, 8, 9, 14)
"""What the policy of a GRUB boot governs."""
ALL_TCBS: Final = ("tcb.reported", "tcb.committed", "tcb.current", "tcb.launch")
Bend = Callable[[SnpMachine], None]


# The machine


def old_microcode(machine: SnpMachine) -> None:
    """T12: the platform runs microcode from before a fix, all the rest is new."""
    machine.reported_tcb = machine.current_tcb = machine.committed_tcb = machine.launch_tcb = (
        machine.reported_tcb[:7] + b"\x01"
    )


def reports_as_old(machine: SnpMachine) -> None:
    """T12: the host has the firmware attest as an old one (SNP_CONFIG), whose key may have leaked."""
    machine.reported_tcb = machine.reported_tcb[:7] + b"\x01"


def runs_old(machine: SnpMachine) -> None:
    """T12: what runs now is old, whatever it attests as."""
    machine.current_tcb = machine.current_tcb[:7] + b"\x01"


def could_go_back(machine: SnpMachine) -> None:
    """T12: what runs is new, but COMMITTED_TCB lets the host load the old firmware again."""
    machine.committed_tcb = bytes(8)


def was_launched_on_old(machine: SnpMachine) -> None:
    """T12: the host updated its firmware after the guest was launched under the old one."""
    machine.launch_tcb = bytes(8)


def unknown_platform_bit(machine: SnpMachine) -> None:
    """T12: PLATFORM_INFO has a bit that this release has no name for."""
    machine.platform_info |= 1 << 40


def unknown_policy_bit(machine: SnpMachine) -> None:
    """T14: the guest policy has a bit that this release has no name for."""
    machine.policy |= 1 << 40


def another_chip(machine: SnpMachine) -> None:
    """T7, T25: a genuine chip, with its own genuine certificate, that is none of the owner's list."""
    machine.chip_id = bytes(byte ^ 0xFF for byte in CHIP_ID)


def another_product(machine: SnpMachine) -> None:
    """T13: a report signed by a Milan key says that it comes from Genoa."""
    machine.overrides |= {"cpuid_fam_id": 0x19, "cpuid_mod_id": 0x11}


UNWANTED_MACHINES: Final[dict[str, tuple[Bend, tuple[str, ...]]]] = {
    "a debug policy": (faults.debug_policy, ("policy.allowed",)),
    "a migration agent": (faults.migration_policy, ("policy.allowed",)),
    "a policy bit without a name": (unknown_policy_bit, ("policy.allowed",)),
    "old firmware": (faults.old_firmware, ALL_TCBS),
    "old microcode": (old_microcode, ALL_TCBS),
    "a key of old firmware": (reports_as_old, ("tcb.reported",)),
    "firmware that is old now": (runs_old, ("tcb.current",)),
    "firmware that can go back": (could_go_back, ("tcb.committed",)),
    "a launch under old firmware": (was_launched_on_old, ("tcb.launch",)),
    "a platform bit without a name": (unknown_platform_bit, ("platform.allowed",)),
    "another chip": (another_chip, ("chip.allowed",)),
}
"""Genuine machines that an owner does not want, and the checks that say so."""

DEMANDS: Final[dict[str, tuple[dict[str, object], str]]] = {
    "platform": ({"platform_required": ["CIPHERTEXT_HIDING_DRAM_EN"]}, "platform.required"),
    "policy": ({"guest_policy_required": ["SINGLE_SOCKET"]}, "policy.required"),
    "launch mitigations": ({"launch_mitigations": 1}, "mitigation.launch"),
    "current mitigations": ({"current_mitigations": 2}, "mitigation.current"),
}
"""What an owner may demand and this machine's report does not say, and the check that misses it."""

UNPROVEN_REPORTS: Final[dict[str, tuple[Bend, str]]] = {
    "a report signed by a key that the attacker made": (faults.signed_by_nobody, "report.signature"),
    "a report that the firmware did not sign": (faults.unsigned_report, "report.signing-key"),
    "another chip's certificate, genuine in itself": (faults.swapped_certificate, "endorsement.chip"),
    "a chip that the certificate does not name": (faults.wrong_chip, "endorsement.chip"),
    "a better TCB than the certificate's": (faults.wrong_tcb, "endorsement.tcb"),
    "an intermediate that AMD has revoked": (faults.revoked_intermediate, "endorsement.revoked"),
    "no certificates at all": (faults.no_certificates, "endorsement.found"),
}
"""Reports that AMD does not vouch for, and the check that notices."""


# Certificates


def another_root(amd: AmdRoot) -> AmdRoot:
    """Make a root with AMD's names and an attacker's keys; the trusted root's, turned round, are fast to come by."""
    ark = simulated_amd._authority(amd.product, "ARK", amd.ask.key, None)
    ask = simulated_amd._authority(amd.product, "SEV", amd.asvk.key, ark)
    return replace(amd, ark=ark, ask=ask, seed=b"an attacker's".ljust(32))


def chain_to_another_root(machine: SnpMachine, *, beside_the_true: bool) -> None:
    """T7: AMD's whole hierarchy built anew: names, extensions, everything but AMD's keys."""
    true = machine.root
    machine.root = another_root(true)
    machine._veks = {}
    chain = machine.chain()
    if beside_the_true:
        chain[certificate_table.ARK] = true.ark_der
    machine.certificates = chain


def vcek_by(machine: SnpMachine, *, common_name: str = "SEV-VCEK", providers: bool = False) -> None:
    """T7: a VCEK to the last extension, over a key of the attacker's; the authority behind it, or its name, is another."""
    root = machine.root
    key = ec.generate_private_key(ec.SECP384R1())
    extensions = [
        *root._tcb_extensions("Milan-B0", machine.reported_tcb),
        (f"{simulated_amd._AMD_OID}.4", machine.chip_id),
    ]
    authority = root.asvk if providers else root.ask
    forged = Vek(root._issue_vek(common_name, authority, key, extensions, None), key)
    machine.impostor = forged
    machine.certificates = machine.chain() | {
        certificate_table.VCEK: forged.certificate_der,
        certificate_table.ASK: root.asvk_der if providers else root.ask_der,
    }


def vlek_with_a_chip(machine: SnpMachine) -> None:
    """T7: a provider's certificate that names a chip as well: neither AMD nor a provider has such a key."""
    machine.signer = "vlek"
    root = machine.root
    key = ec.generate_private_key(ec.SECP384R1())
    extensions = [
        *root._tcb_extensions("Milan", machine.reported_tcb),
        (f"{simulated_amd._AMD_OID}.4", machine.chip_id),
        (f"{simulated_amd._AMD_OID}.5", simulated_amd._ia5(machine.csp_id)),
    ]
    forged = Vek(root._issue_vek("SEV-VLEK", root.asvk, key, extensions, None), key)
    machine.impostor = forged
    machine.certificates = machine.chain() | {certificate_table.VLEK: forged.certificate_der}
    machine.overrides["chip_id"] = machine.chip_id


def remove_lists(office: Owner) -> None:
    """Take the revocation list out of the verifier's cache."""
    for path in (office.directory / "endorsements" / "crl").iterdir():
        path.unlink()


# The TPM


def good_pcrs() -> dict[int, bytes]:
    """Give the PCR values that the owner wants to see, the cap's too."""
    boot = measured_boot.grub()
    return {index: boot.pcr(index) for index in (*GOVERNED, 15)}


def with_software_ak(attacker: Attacker, ak: SoftwareAk) -> dict[str, Any]:
    """Make evidence whose quote a software key signs, over perfect PCR values, with a log to match."""
    parts = attacker.evidence(attacker.hello(ak_public=ak.public))
    return parts | ak.quote(t1_of(parts), good_pcrs()) | {"event_log": measured_boot.grub().event_log()}


def everything_in_software(attacker: Attacker, vmpl: int) -> dict[str, Any]:
    """Make evidence with an EK, an AK, PCRs and a log out of files, all of it vouched for by one report.

    From here on the attacker opens answers with that EK.
    """
    assert attacker.svsm is not None
    soft = SoftwareTpm()
    attacker.activate = soft.activate
    attacker.svsm.vmpl, attacker.svsm.manifest = vmpl, soft.ek_public
    return software_evidence(attacker, soft, soft.ek_public)


def software_evidence(attacker: Attacker, soft: SoftwareTpm, ek_public: bytes) -> dict[str, Any]:
    """Make evidence with this EK in Hello and manifest, and a quote by the AK in files."""
    parts = attacker.evidence(attacker.hello(ek_public=ek_public, ak_public=soft.ak.public))
    parts |= {"manifest": ek_public, "event_log": measured_boot.grub().event_log()}
    return parts | soft.ak.quote(t1_of(parts), good_pcrs())


def raw_quote(attacker: Attacker, qualifying: bytes, selection: bytes) -> dict[str, Any]:
    """Have the TPM quote what the agent would refuse to ask for."""
    device = attacker.tpm
    select, _ = TPML_PCR_SELECTION.unmarshal(selection)
    attest, signature = device._esapi.quote(device._ak, select, qualifying)
    return {"quote": messages.Quote(attest=bytes(attest), signature=bytes(signature.marshal()))}


@contextlib.contextmanager
def tpm_key(attacker: Attacker, template: str, lacks: int = 0) -> Iterator[bytes]:
    """Have the TPM make another attestation key, and use it in the AK's place; gives its public area."""
    device = attacker.tpm
    area = TPMT_PUBLIC.parse(template, objectAttributes=int(AK_REQUIRED | TPMA_OBJECT.USERWITHAUTH) & ~lacks)
    own = device._ak
    device._ak, public, *_ = device._esapi.create_primary(
        TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=area), ESYS_TR.ENDORSEMENT
    )
    try:
        yield bytes(public.publicArea.marshal())
    finally:
        device._esapi.flush_context(device._ak)
        device._ak = own


def signed_by_the_tpm(attacker: Attacker, attest: bytes) -> dict[str, Any]:
    """Have the TPM sign a quote that was made by hand, over the PCRs that the owner wants to see."""
    device = attacker.tpm
    digest, ticket = device._esapi.hash(attest, TPM2_ALG.SHA256, ESYS_TR.OWNER)
    if attest[:4] == b"\xffTCG":  # for these the TPM gives no ticket
        ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
    scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
    signed = device._esapi.sign(device._ak, TPM2B_DIGEST(bytes(digest)), scheme, ticket)
    return quoted(Quote(attest, bytes(signed.marshal()), sorted(good_pcrs().items())))


@contextlib.contextmanager
def quote_by_an_unrestricted_key(attacker: Attacker) -> Iterator[dict[str, Any]]:
    """T9: root has the genuine TPM make an unrestricted key and sign a quote over PCRs that it never had."""
    with tpm_key(attacker, "ecc256:ecdsa-sha256:null", int(TPMA_OBJECT.RESTRICTED)) as public:
        parts = attacker.evidence(attacker.hello(ak_public=public))
        parts |= signed_by_the_tpm(attacker, made_up_attest(t1_of(parts), good_pcrs()))
        yield parts | {"event_log": measured_boot.grub().event_log()}
