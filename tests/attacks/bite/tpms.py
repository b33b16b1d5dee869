"""Stories of steps 5 to 8 and of the PCRs in step 9: the tie, the AK, the quote, the log."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
from tests.attacks import lies
from tests.attacks.attacker import SoftwareAk, made_up_attest, quoted, recoded, t1_of
from tests.attacks.bite.story import Story, ask_as_the_vm_does, loot, sent, steal
from tests.attacks.lies import GOVERNED
from tests.attacks.software import SoftwareTpm
from tests.worlds import VM

from kagimori_agent.devices.vtpm import Quote
from kagimori_protocol import tpm
from kagimori_protocol.messages import Hello, PcrValue
from kagimori_simulator import measured_boot
from kagimori_simulator.event_log import EventType, MeasuredBoot, same
from kagimori_verifier.store import references

if TYPE_CHECKING:
    from typing import Any

    from tests.attacks.bite.story import Scene, Where

WISHED = [PcrValue(index=index, digest=digest) for index, digest in sorted(lies.good_pcrs().items())]
HONEST_LOG = measured_boot.grub().event_log()
BOOT_WAYS: dict[Where, tuple[int, ...]] = {"honest": GOVERNED, "uki": (11, 12, 13)}
"""PCRs that each boot way governs; of a UKI those that GRUB has not."""
WITHOUT_THE_KERNEL = tpm.pcr_selection({*GOVERNED, 15} - {4, 9})


def manifest_swapped(scene: Scene) -> None:
    """The SVSM vouches for its own TPM; behind its back an EK out of files takes the manifest's place."""
    attacker = scene.attacker()
    soft = SoftwareTpm()
    attacker.activate = soft.activate
    steal(attacker, lies.software_evidence(attacker, soft, soft.ek_public))


def report_relayed(scene: Scene) -> None:
    """The VM's own report, made for its own key, in a session whose answer the thief can open."""
    scene.machine.reboot()
    vm, thief = scene.attacker(), scene.attacker()
    theirs = vm.evidence()
    steal(thief, thief.evidence() | {"report": theirs["report"]})


def evidence_relayed(scene: Scene) -> None:
    """The VM's own evidence, whole; only its HPKE key is replaced by the thief's."""
    scene.machine.reboot()
    vm, thief = scene.attacker(), scene.attacker()
    theirs = vm.evidence()
    hello = recoded(theirs["hello"], Hello, hpke_public_key=thief.key.public)
    steal(thief, theirs | {"hello": hello})


def ek_template_of_the_attackers_choice(scene: Scene) -> None:
    """A vTPM lets the guest choose the EK's template; this EK was made outside and loaded, so its maker has the key too."""
    attacker = scene.attacker()
    soft = SoftwareTpm()
    chosen = soft.ek_public[:7] + b"\xa0" + soft.ek_public[8:]  # neither fixedTPM nor fixedParent
    attacker.activate = soft.activate
    scene.monitor.manifest = chosen
    steal(attacker, lies.software_evidence(attacker, soft, chosen))


def hello_names_a_strangers_ek(scene: Scene) -> None:
    """What the owner reads in Hello is another TPM than the one that gets the credential."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence(attacker.hello(ek_public=SoftwareTpm().ek_public)))


def tpm_parts_of_a_plain_guest(scene: Scene) -> None:
    """A plain guest shows a software TPM with perfect PCRs beside its report."""
    attacker = scene.attacker()
    soft = SoftwareTpm()
    scene.machine.reboot()
    parts = attacker.evidence(attacker.hello(ek_public=soft.ek_public, ak_public=soft.ak.public))
    parts |= {"manifest": soft.ek_public, "event_log": HONEST_LOG}
    steal(attacker, parts | soft.ak.quote(t1_of(parts), lies.good_pcrs()))


def no_log(scene: Scene) -> None:
    """The quote is perfect, and nobody says what is behind it."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence() | {"event_log": msgspec.UNSET})


def ak_with_a_tail(scene: Scene) -> None:
    """One reader sees an AK, another an AK and something more."""
    attacker = scene.attacker()
    _, ak_public = attacker.public_areas
    steal(attacker, attacker.evidence(attacker.hello(ak_public=ak_public + b"\x00")))


def unrestricted_key(scene: Scene) -> None:
    """A bad boot, and the genuine TPM signs with a key of its own what its root wrote by hand."""
    attacker = scene.attacker()
    with lies.quote_by_an_unrestricted_key(attacker) as parts:
        steal(attacker, parts)


def unusual_key(scene: Scene) -> None:
    """The genuine TPM quotes with a key whose signatures nobody here has thought about."""
    attacker = scene.attacker()
    with lies.tpm_key(attacker, "ecc384:ecdsa-sha256:null") as public:
        steal(attacker, attacker.evidence(attacker.hello(ak_public=public)))


def words_without_a_mark(scene: Scene) -> None:
    """A bad boot; the genuine AK signs outside data, as a restricted key does where the TPM's mark is missing."""
    attacker = scene.attacker()
    parts = attacker.evidence()
    attest = made_up_attest(t1_of(parts), lies.good_pcrs(), magic=b"\x00TCG")
    steal(attacker, parts | lies.signed_by_the_tpm(attacker, attest) | {"event_log": HONEST_LOG})


def quote_from_before_the_cap(scene: Scene) -> None:
    """Root of the booted VM has kept a quote from before the agent capped it, made for another exchange."""
    attacker = scene.attacker()
    before: Quote = scene.kept["quote"]
    steal(attacker, attacker.evidence() | quoted(before))


def kernel_left_out_of_the_quote(scene: Scene) -> None:
    """A bad kernel; the TPM quotes the PCRs that do not tell of it, and words fill the gap."""
    attacker = scene.attacker()
    parts = attacker.evidence() | {"pcrs": WISHED, "event_log": HONEST_LOG}
    steal(attacker, parts | lies.raw_quote(attacker, t1_of(parts), WITHOUT_THE_KERNEL))


def values_that_were_not_quoted(scene: Scene) -> None:
    """A bad kernel, quoted honestly; the values beside the quote are those that the owner wants."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence() | {"pcrs": WISHED, "event_log": HONEST_LOG})


def signed_by_somebody(scene: Scene) -> None:
    """A bad kernel; Hello names the genuine AK, and a key out of files signs."""
    attacker = scene.attacker()
    parts = attacker.evidence() | {"event_log": HONEST_LOG}
    steal(attacker, parts | SoftwareAk().quote(t1_of(parts), lies.good_pcrs()))


def signature_with_a_tail(scene: Scene) -> None:
    """One reader sees a signature, another a signature and something more."""
    attacker = scene.attacker()
    parts = attacker.evidence()
    quote = parts["quote"]
    steal(attacker, parts | {"quote": msgspec.structs.replace(quote, signature=quote.signature + b"\x00")})


def with_log(log: bytes, scene: Scene) -> None:
    """Send another log than the firmware's."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence() | {"event_log": log})


def learned_lies(scene: Scene) -> None:
    """The owner is to read, in a session's record, of a boot that never was; the key comes on top."""
    attacker = scene.attacker()
    honest = measured_boot.grub()
    lie = MeasuredBoot("grub", (*honest.events, same(8, EventType.IPL, b"grub_cmd: an innocent word\x00")))
    told = sent(attacker, attacker.evidence() | {"event_log": lie.event_log()})
    assert loot(attacker, told)


def another_reference(index: int, scene: Scene) -> None:
    """The owner has accepted another value of one PCR than this boot has, all others as they are."""
    with scene.office.verifier.store.write() as txn:
        for kind, owner in (("vm", VM), ("profile", scene.profile)):
            for state in references.boot_states(txn, kind, owner):
                if str(index) in state.pcrs:
                    pcrs: dict[str, Any] = state.pcrs | {str(index): {"digest": "5a" * 32, "events": []}}
                    references.remove_boot_state(txn, state.id)
                    references.add_boot_state(
                        txn, references.BootStateRow(kind, owner, "accepted", pcrs, "test", 0)
                    )


STORIES: tuple[Story, ...] = (
    Story("T9: a manifest swapped behind the SVSM's back", ("report.tie",), manifest_swapped),
    Story("T7: a plain guest's report for another key", ("report.tie",), report_relayed, "direct"),
    Story(
        "T7: a plain guest's evidence with another key",
        ("session.hello", "report.tie"),
        evidence_relayed,
        "direct",
    ),
    Story("T9: an EK that the attacker made", ("manifest.ek",), ek_template_of_the_attackers_choice),
    Story("T9: a Hello with a stranger's EK", ("manifest.hello",), hello_names_a_strangers_ek),
    Story("T9: a TPM beside a plain guest", ("evidence.parts",), tpm_parts_of_a_plain_guest, "direct"),
    Story(
        "T22: no log at all",
        ("evidence.parts", "eventlog.layout", "eventlog.replay", "cmdline.doors"),
        no_log,
    ),
    Story("T22: an AK with a tail", ("ak.layout",), ak_with_a_tail),
    Story("T9: a key that signs what one gives it", ("ak.attributes",), unrestricted_key, "evil"),
    Story("T9: a key of another make", ("ak.scheme", "quote.signature"), unusual_key),
    Story("T9: words without the TPM's mark", ("quote.layout",), words_without_a_mark, "evil"),
    Story("T8: a quote from before the cap", ("quote.qualifying-data",), quote_from_before_the_cap, "capped"),
    Story(
        "T22: the kernel left out of the quote",
        ("quote.pcr-selection", "quote.pcr-values"),
        kernel_left_out_of_the_quote,
        "evil",
    ),
    Story("T22: values that were not quoted", ("quote.pcr-values",), values_that_were_not_quoted, "evil"),
    Story("T9: a quote signed by somebody", ("quote.signature",), signed_by_somebody, "evil"),
    Story("T22: a signature with a tail", ("quote.signature-layout",), signature_with_a_tail),
    Story("T22: a log with a tail", ("eventlog.layout",), partial(with_log, HONEST_LOG + b"\x00" * 7)),
    Story("T22: a log with an event too many", ("eventlog.replay",), learned_lies),
    Story("T5: a bad kernel", ("pcr.4", "pcr.9"), ask_as_the_vm_does, "evil"),
    Story("T5: a command line that lets the host in", ("cmdline.doors",), ask_as_the_vm_does, "doors"),
    Story("T4: a capped boot", ("cap.off",), ask_as_the_vm_does, "capped"),
    *(
        Story(
            f"T22: a boot that differs in PCR {index}",
            (f"pcr.{index}",),
            ask_as_the_vm_does,
            where,
            partial(another_reference, index),
        )
        for where, indices in BOOT_WAYS.items()
        for index in indices
    ),
)
