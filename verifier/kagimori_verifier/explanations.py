"""What each named check is about, and what to do when it fails: the words of ``explain``, in the order of the pipeline.

A test holds that every check in the code is explained here and that nothing else is.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Explanation(NamedTuple):
    """``step`` of PROTOCOL.md section 6, what the check guards, and what an owner does when it fails."""

    step: int
    about: str
    todo: str


_FRESH = (
    "Nothing, if the VM tries again and succeeds; if not, someone changes or repeats messages on their way."
)
_HOST = "The host supplies this, not the VM. Ask the provider, or import the right file yourself."
_IMPORT = "Import AMD's certificates: kagimori-verifier endorsements import FILE..."
_ATTACK = "If you did not change this VM, treat it as an attack: the key was not released."
_REFERENCE = (
    "If you changed the VM on purpose, record the new state: `kagimori-verifier reference accept SESSION` "
    "for a dry-run whose Confirm has arrived. If you did not, do not."
)
_POLICY = "Change the profile only if you accept the risk: kagimori-verifier profile show|edit NAME."

EXPLANATIONS: Final[dict[str, Explanation]] = {
    "message.decode": Explanation(
        1, "The evidence can be read, in its one form.", "Agent and verifier must be of versions that fit."
    ),
    "session.token": Explanation(1, "The evidence answers a challenge of this verifier.", _FRESH),
    "session.hello": Explanation(1, "The Hello is the one that the challenge was made for.", _ATTACK),
    "session.challenge": Explanation(1, "The Challenge is as it was sent, its PCR selection too.", _ATTACK),
    "session.fresh": Explanation(1, "The challenge is not too old: a recorded run is worth nothing.", _FRESH),
    "session.unused": Explanation(
        10, "Each challenge is answered once; the same evidence may come again, other evidence not.", _ATTACK
    ),
    "vm.enabled": Explanation(
        2,
        "The VM is enrolled here and enabled.",
        "kagimori-verifier vm list | vm enable NAME; compare vm_id in agent.toml.",
    ),
    "vm.purpose": Explanation(
        2, "The VM may ask for this.", "kagimori-verifier vm show NAME lists the purposes."
    ),
    "vm.volumes": Explanation(
        2,
        "The VM asks for volumes of its own.",
        "Compare [[volumes]] in agent.toml with `kagimori-verifier volume list`.",
    ),
    "report.layout": Explanation(
        3,
        "The bytes are an attestation report of a known version.",
        "A newer release of Kagimori may know a newer report.",
    ),
    "report.signing-key": Explanation(3, "The report is signed by the chip's or the provider's key.", _HOST),
    "report.signature-algo": Explanation(3, "The report names the one algorithm that AMD uses.", _ATTACK),
    "endorsement.found": Explanation(3, "There is a certificate for the key that signed.", _IMPORT),
    "endorsement.root": Explanation(3, "There is a certificate of a root that you trust.", _IMPORT),
    "endorsement.chain": Explanation(3, "The certificate chains to that root.", _IMPORT),
    "endorsement.revoked": Explanation(
        3,
        "AMD has not withdrawn the intermediate certificate.",
        "Ask the provider for a host with current firmware.",
    ),
    "endorsement.product": Explanation(3, "Root, certificate and report speak of one product line.", _ATTACK),
    "report.tcb-layout": Explanation(
        3, "The firmware versions can be read.", "A newer release of Kagimori may know a newer product."
    ),
    "endorsement.tcb": Explanation(3, "The certificate is for the firmware versions in the report.", _HOST),
    "endorsement.chip": Explanation(3, "The certificate is for the chip in the report.", _HOST),
    "report.signature": Explanation(3, "The signature over the report holds.", _ATTACK),
    "report.measurement": Explanation(
        4,
        "What the chip measured at launch is a known build.",
        "If you deployed a new SVSM or firmware: kagimori-verifier reference measurement.",
    ),
    "report.vmpl": Explanation(
        4, "The report was asked for by the most privileged part of the guest.", _ATTACK
    ),
    "measurement.svsm-features": Explanation(
        4,
        "The SVSM build attests nothing but its vTPM.",
        "Use COCONUT's default build, and record its features as they are.",
    ),
    "measurement.one-vm": Explanation(
        4,
        "Without a TPM, the measurement is one VM's own: it covers the initramfs, and that names the VM.",
        "Give each VM of kind snp-direct an initramfs and a profile of its own.",
    ),
    "evidence.parts": Explanation(
        5,
        "The evidence has the parts that its kind needs.",
        "The measurement decides the kind: compare it with what the VM runs.",
    ),
    "report.tie": Explanation(5, "The report was made for this exchange, this key and this TPM.", _ATTACK),
    "manifest.ek": Explanation(
        5,
        "The SVSM vouches for exactly one standard TPM key.",
        "Use an SVSM with manifest version 0 (COCONUT's).",
    ),
    "manifest.hello": Explanation(
        5, "The TPM that the agent uses is the one that the SVSM vouches for.", _ATTACK
    ),
    "ak.layout": Explanation(
        6, "The signing key of the TPM can be read.", "Agent and verifier must be of versions that fit."
    ),
    "ak.attributes": Explanation(
        6, "The signing key is one that signs only what the TPM made itself.", _ATTACK
    ),
    "ak.scheme": Explanation(
        6, "The signing key is of a known kind.", "Agent and verifier must be of versions that fit."
    ),
    "quote.layout": Explanation(7, "The quote is one.", _ATTACK),
    "quote.qualifying-data": Explanation(7, "The quote was made for this exchange and this report.", _ATTACK),
    "quote.pcr-selection": Explanation(
        7, "The quote covers exactly the PCRs that the policy wants.", _ATTACK
    ),
    "quote.signature-layout": Explanation(7, "The quote's signature can be read.", _ATTACK),
    "quote.signature": Explanation(7, "The quote is signed by that key.", _ATTACK),
    "quote.pcr-values": Explanation(7, "The PCR values are those that were quoted.", _ATTACK),
    "eventlog.layout": Explanation(
        8, "The firmware's event log can be read.", "See `kagimori-agent doctor` in the VM."
    ),
    "eventlog.replay": Explanation(
        8,
        "The log explains the quoted values.",
        "Something extended a PCR without logging it; see `kagimori-agent doctor` in the VM.",
    ),
    "signer.allowed": Explanation(9, "The policy accepts who signed the report.", _POLICY),
    "signer.provider": Explanation(9, "The provider's key is one that the policy accepts.", _POLICY),
    "endorsement.valid": Explanation(9, "The certificates are valid today.", _IMPORT),
    "endorsement.revocation": Explanation(9, "There is a current revocation list.", _IMPORT),
    "policy.allowed": Explanation(
        9,
        "The guest was launched without rights that help the host.",
        "Launch the VM with another guest policy. " + _POLICY,
    ),
    "policy.required": Explanation(
        9,
        "The guest was launched with what the policy demands.",
        "Launch the VM with another guest policy. " + _POLICY,
    ),
    "platform.allowed": Explanation(
        9, "The platform has nothing switched on that the policy does not know.", _POLICY
    ),
    "platform.required": Explanation(9, "The platform has switched on what the policy demands.", _POLICY),
    "product.allowed": Explanation(9, "The policy has a firmware floor for this product line.", _POLICY),
    "tcb.reported": Explanation(
        9,
        "The firmware that the key vouches for is recent enough.",
        "Ask the provider for a host with current firmware. " + _POLICY,
    ),
    "tcb.committed": Explanation(
        9,
        "The host cannot go back to older firmware.",
        "Ask the provider for a host with current firmware. " + _POLICY,
    ),
    "tcb.current": Explanation(
        9,
        "The firmware that runs is recent enough.",
        "Ask the provider for a host with current firmware. " + _POLICY,
    ),
    "tcb.launch": Explanation(
        9,
        "The firmware under which the guest was launched was recent enough.",
        "Stop and start the VM. " + _POLICY,
    ),
    "mitigation.launch": Explanation(
        9,
        "The mitigations that the policy demands were on at launch.",
        "Ask the provider for a host with current firmware. " + _POLICY,
    ),
    "mitigation.current": Explanation(
        9,
        "The mitigations that the policy demands are on.",
        "Ask the provider for a host with current firmware. " + _POLICY,
    ),
    "chip.allowed": Explanation(
        9,
        "The VM runs on a chip that it may run on.",
        "If the provider moved it: kagimori-verifier vm chip add NAME CHIP_ID.",
    ),
    "pcr": Explanation(9, "What was booted is what you recorded.", _REFERENCE),
    "volume.accepted": Explanation(
        9,
        "The volume was enrolled by a boot that you know, or you have accepted it.",
        "Look at the session that enrolled it, and then: kagimori-verifier volume accept --vm NAME UUID.",
    ),
    "volume.provenance": Explanation(
        9,
        "Who may know the volume key, which no keyslot changes. It is told, and never a reason to refuse.",
        "Run `kagimori-agent enrol --reencrypt` in the VM.",
    ),
    "cap.off": Explanation(
        9,
        "Nobody in this boot has used its one chance before.",
        "Reboot the VM: a booted system cannot get its key again.",
    ),
    "cmdline.doors": Explanation(
        9,
        "The command line closes every door to the host, but for those that you accept by name.",
        "Put Kagimori's words on it (docs/policy.md), or accept a door: accepted_doors by profile edit NAME.",
    ),
    "boot.unopened": Explanation(
        10,
        "This boot has not confirmed before that its volumes are open.",
        "Reboot the VM: a booted system cannot get its key again.",
    ),
    "enrol.code": Explanation(
        10,
        "The VM's operator was given a code, which is good for one enrolment and for a limited time.",
        "kagimori-verifier vm code NAME makes a new one.",
    ),
    "enrol.proof": Explanation(
        10,
        "Whoever asks in the VM knows that code.",
        "Make a new code and type it again: kagimori-verifier vm code NAME. If it was typed well, somebody else asks.",
    ),
    "confirm.session": Explanation(12, "A Confirm belongs to an answer that was given.", _FRESH),
    "confirm.mac": Explanation(12, "A Confirm comes from whoever opened both layers of the answer.", _ATTACK),
    "confirm.order": Explanation(12, "An outcome that is final stays.", _ATTACK),
    "eventlog.bank": Explanation(
        8, "The log has digests of the SHA-256 bank.", "See `kagimori-agent doctor` in the VM."
    ),
    "eventlog.userspace": Explanation(
        8,
        "What the guest extends after its firmware is what a TPM would take.",
        "A newer release of Kagimori may know more.",
    ),
    "certificate.chain": Explanation(3, "Each certificate is signed by the next one's key.", _IMPORT),
    "boot.ungranted": Explanation(10, "Without a TPM, a boot gets its keys once.", "Reboot the VM."),
}


def explanation(check: str) -> Explanation:
    """Explain a check by its id; ``pcr.4`` and its like are ``pcr``. Raises KeyError for one that does not exist."""
    return EXPLANATIONS["pcr" if check.startswith("pcr.") else check]
