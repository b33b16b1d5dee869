"""Stories of steps 3, 4 and 9: the report, what endorses it, and the machine that it tells of."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from sqlalchemy import delete
from tests.attacks import lies
from tests.attacks.bite import twins
from tests.attacks.bite.story import Story, ask_as_the_vm_does, steal
from tests.attacks.lies import ALL_TCBS, DEMANDS, UNPROVEN_REPORTS, UNWANTED_MACHINES

from kagimori_protocol import certificate_table
from kagimori_simulator import faults
from kagimori_simulator.amd import DEFAULT_CSP_ID
from kagimori_verifier.appraise.policy import TcbFloor
from kagimori_verifier.store import schema

if TYPE_CHECKING:
    from tests.attacks.bite.story import Scene, Where

    from kagimori_simulator.machine import SnpMachine

TEN_YEARS_S = 10 * 366 * 86_400
ALONE = (
    "a report signed by a key that the attacker made",
    "an intermediate that AMD has revoked",
)
"""Of UNPROVEN_REPORTS those that one check alone stops. The others are told below, with what else stops them."""


def on(bend: lies.Bend, told: str, *checks: str, where: Where = "honest") -> Story:
    """Tell of a machine that is bent, and whose evidence is honest."""
    return Story(told, checks, ask_as_the_vm_does, where, lambda scene: bend(scene.machine))


def under(told: str, demand: dict[str, object], *checks: str) -> Story:
    """Tell of an owner who demands more than the machine has."""

    def prepare(scene: Scene) -> None:
        scene.office.change_policy(scene.profile, **demand)

    return Story(told, checks, ask_as_the_vm_does, prepare=prepare)


def swapped_chip(machine: SnpMachine) -> None:
    """Another chip's report says that it comes from the chip on the owner's list."""
    machine.overrides["chip_id"] = machine.chip_id
    lies.another_chip(machine)


def better_than_certified(machine: SnpMachine) -> None:
    """Old firmware's key signs a report that tells of the new one's TCB."""
    machine.overrides["reported_tcb"] = machine.reported_tcb
    lies.reports_as_old(machine)


def unsigned_by_the_platform(machine: SnpMachine) -> None:
    """The host masks the chip's key, so the firmware signs nothing; the bytes are whoever's."""
    machine.overrides["key_info"] = 1 << 1
    faults.signed_by_nobody(machine)


def no_root(scene: Scene) -> None:
    """The operator never told this verifier of the simulated root: to it, its key is a stranger's."""
    with scene.office.verifier.store.write() as txn:
        txn.execute(delete(schema.root))


def providers_machine(scene: Scene) -> None:
    """The host signs with its provider's key instead of the chip's."""
    scene.machine.signer = "vlek"


def another_providers_machine(scene: Scene) -> None:
    """The owner trusts one provider; the machine is another's."""
    providers_machine(scene)
    scene.office.change_policy(scene.profile, signers=["vlek"], csp_ids=["CN=another"], any_chip=True)


def a_chips_own_key(scene: Scene) -> None:
    """The owner trusts a provider's word only; the machine signs with its own."""
    scene.office.change_policy(scene.profile, signers=["vlek"], csp_ids=[DEFAULT_CSP_ID], any_chip=True)


def a_providers_key_with_a_chip(scene: Scene) -> None:
    """The owner trusts this provider; the certificate is of a make that nobody has."""
    scene.office.change_policy(scene.profile, signers=["vlek"], csp_ids=[DEFAULT_CSP_ID], any_chip=True)
    lies.vlek_with_a_chip(scene.machine)


def old_list(scene: Scene) -> None:
    """The host plays a list from before AMD revoked anything; the owner wants a current one where there is one."""
    lies.remove_lists(scene.office)
    old = scene.office.root.crl(last_update=dt.datetime.now(dt.UTC) - dt.timedelta(days=800))
    scene.machine.certificates = scene.machine.chain() | {certificate_table.CRL: old}
    scene.office.change_policy(scene.profile, revocation="if-present")


def in_ten_years(scene: Scene) -> None:
    """The verifier's clock says that the certificates, and the list, have had their time."""
    scene.office.move_clock(TEN_YEARS_S)


def genoa_only(scene: Scene) -> None:
    """The owner has given no floor for Milan."""
    genoa = TcbFloor(boot_loader=10, tee=0, snp=23, microcode=84)
    scene.office.change_policy(scene.profile, tcb_floors={"Genoa": genoa})


def guest_kernel_plays_svsm(scene: Scene) -> None:
    """Root of a guest at VMPL 2 vouches for EK, AK and PCRs out of files."""
    attacker = scene.attacker()
    steal(attacker, lies.everything_in_software(attacker, vmpl=2))


def svsm_signs_anything(scene: Scene) -> None:
    """The SVSM's build attests, at VMPL 0, what whoever asks gives it to attest."""
    attacker = scene.attacker()
    steal(attacker, lies.everything_in_software(attacker, vmpl=0))


def attest_build(scene: Scene) -> None:
    """The owner has recorded a build with another attestation service beside the vTPM's."""
    scene.machine.measurement = b"\x77" * 48
    scene.office.enrol_measurement(scene.profile, "svsm-vtpm", scene.machine.measurement, ["attest", "vtpm"])


def shared_image(scene: Scene) -> None:
    """A second VM may show the same measurement, so its root may say that it is the first."""
    scene.office.enrol_profile("twin", "direct", "snp-direct", scene.machine.measurement)
    scene.office.enrol_vm("web2", "twin")


STORIES: tuple[Story, ...] = (
    *(
        on(bend, f"T7, T15: {told}", check)
        for told, (bend, check) in UNPROVEN_REPORTS.items()
        if told in ALONE
    ),
    *(on(bend, f"T12, T14: {told}", *checks) for told, (bend, checks) in UNWANTED_MACHINES.items()),
    *(under(f"T12: what was demanded of {told}", demand, check) for told, (demand, check) in DEMANDS.items()),
    on(
        lambda machine: machine.overrides.update(version=6),
        "T22: a report of a version that nobody here knows, genuine, with a meaning that nobody here knows",
        "report.layout",
    ),
    on(
        lambda machine: machine.overrides.update(current_tcb=b"\xff" * 8),
        "T12: a TCB of another product's order, which sorts above every floor",
        "report.tcb-layout",
    ),
    on(
        lambda machine: machine.overrides.update(signature_algo=2),
        "T22: a report that says that it is signed in another way than is verified",
        "report.signature-algo",
    ),
    on(
        unsigned_by_the_platform,
        "T7: a report that the firmware did not sign, so anybody may have written it",
        "report.signing-key",
        "report.signature",
    ),
    on(better_than_certified, "T12: old firmware's key under new firmware's TCB", "endorsement.tcb"),
    on(
        faults.swapped_certificate,
        "T7: another chip's certificate, genuine in itself",
        "endorsement.chip",
        "report.signature",
    ),
    on(swapped_chip, "T7: another chip's report in the name of the owner's chip", "endorsement.chip"),
    on(lies.another_product, "T13: Milan's key under a report of Genoa", "endorsement.product"),
    on(
        lambda machine: lies.vcek_by(machine, common_name="SEV-OTHER"),
        "T7: a key that AMD's ASK has certified for something else",
        "endorsement.found",
    ),
    on(
        lambda machine: lies.chain_to_another_root(machine, beside_the_true=True),
        "T7: AMD's hierarchy built anew, with the true root beside it",
        "endorsement.chain",
    ),
    Story(
        "T7: a provider's intermediate, stolen, makes a VCEK",
        ("endorsement.chain",),
        ask_as_the_vm_does,
        prepare=lambda scene: lies.vcek_by(scene.machine, providers=True),
        twins={"endorsement.chain": twins.any_intermediate},
    ),
    Story("T7: a root that nobody here trusts", ("endorsement.root",), ask_as_the_vm_does, prepare=no_root),
    Story(
        "T13: a provider's key in the chip's place",
        ("signer.allowed", "signer.provider", "chip.allowed"),
        ask_as_the_vm_does,
        prepare=providers_machine,
    ),
    Story(
        "T13: another provider's machine",
        ("signer.provider",),
        ask_as_the_vm_does,
        prepare=another_providers_machine,
    ),
    Story(
        "T7: a provider's certificate that names a chip",
        ("endorsement.chip",),
        ask_as_the_vm_does,
        prepare=a_providers_key_with_a_chip,
    ),
    Story(
        "T13: a chip's own key where only a provider's counts",
        ("signer.allowed",),
        ask_as_the_vm_does,
        prepare=a_chips_own_key,
    ),
    Story(
        "T15: no revocation list",
        ("endorsement.revocation",),
        ask_as_the_vm_does,
        prepare=lambda scene: lies.remove_lists(scene.office),
    ),
    Story("T15: an old list", ("endorsement.revocation",), ask_as_the_vm_does, prepare=old_list),
    Story(
        "T15, T23: certificates and list of ten years ago",
        ("endorsement.valid", "endorsement.revocation"),
        ask_as_the_vm_does,
        prepare=in_ten_years,
    ),
    Story(
        "T13: a product without a floor",
        ("product.allowed", *ALL_TCBS),
        ask_as_the_vm_does,
        prepare=genoa_only,
    ),
    on(faults.another_measurement, "T11: an SVSM that nobody knows", "report.measurement"),
    Story("T11: a guest kernel plays SVSM", ("report.vmpl",), guest_kernel_plays_svsm),
    on(faults.host_requested_report, "T11: the host's own report", "report.vmpl"),
    Story(
        "T9, T10: an SVSM that signs what one gives it",
        ("measurement.svsm-features",),
        svsm_signs_anything,
        prepare=attest_build,
    ),
    Story(
        "T4, T19: one image for two VMs without a TPM",
        ("measurement.one-vm",),
        ask_as_the_vm_does,
        "direct",
        shared_image,
    ),
)
