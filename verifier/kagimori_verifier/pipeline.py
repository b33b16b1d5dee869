"""PROTOCOL.md section 6 as a table of contents: cheap first, every failure named, secrets last.

``judge`` walks steps 1 to 9. Steps 1 to 8 raise NotAuthentic at the first check that does not hold; step 9
gathers. Steps 10 and 11 are ``release``'s. What the owner knows comes from ``Facts``; the clock is an
argument.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from msgspec import UNSET

from kagimori_protocol import messages, tpm, transcript
from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.snp import VMPL_HOST_REQUESTED
from kagimori_verifier import token
from kagimori_verifier.appraise import appraise
from kagimori_verifier.appraise.volumes import appraise_volumes
from kagimori_verifier.claims import BootClaims, Claims
from kagimori_verifier.decision import Allow, Deny, decide
from kagimori_verifier.parts import VtpmParts, require_no_tpm, vtpm_parts
from kagimori_verifier.sessions import require_own
from kagimori_verifier.states import STAGED, WAITING
from kagimori_verifier.verify import eventlog
from kagimori_verifier.verify.eventlog import LoggedBoot
from kagimori_verifier.verify.memory import Memory, key_of
from kagimori_verifier.verify.snp import Endorsements, verify_report
from kagimori_verifier.verify.vtpm import verify_ak, verify_direct, verify_manifest, verify_quote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kagimori_protocol.messages import Challenge, Hello, Purpose
    from kagimori_protocol.snp import Report
    from kagimori_verifier.appraise.policy import Policy
    from kagimori_verifier.appraise.reference import References
    from kagimori_verifier.claims import Measurement, SnpClaims
    from kagimori_verifier.roots import TrustedRoots
    from kagimori_verifier.sessions import OwnKeys
    from kagimori_verifier.trail import Trail

SVSM_FEATURES: Final = frozenset({"vtpm"})
"""The one set of SVSM build features that ``svsm-vtpm`` accepts: the vTPM is the only VMPL 0 attestation service,
and it is ephemeral (PROTOCOL.md section 2)."""

MOST_CERTIFICATES: Final = 32 << 20
MOST_LOGS: Final = 48 << 20
"""Bytes that are remembered of certificates and of event logs: some 350 of AMD's, and the logs of some 250 VMs like Ubuntu's."""
_EVENT: Final = 768
"""Bytes that an event takes beside its data and its description, once it is read."""

MOST_VOLUMES: Final = 16
"""Volumes that a VM can ask for (kagimori_protocol.messages.Hello)."""

VMPL: Final = 0
"""Both kinds demand it: there the SVSM runs, or the whole guest where there is none."""


@dataclass(frozen=True, slots=True)
class Vm:
    """What the owner knows of one VM."""

    vm_id: str
    enabled: bool
    purposes: frozenset[Purpose]
    volumes: frozenset[str]
    profile: str
    references: References
    others: Mapping[str, str] = field(default_factory=dict)
    """Volumes that have no key to be released yet: UUID to state."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Where each volume's key was made: UUID to store.enrolments.Provenance."""


class Facts(Protocol):
    """Where the owner's knowledge comes from: the database, in production."""

    def policy(self, vm_id: str) -> Policy | None:
        """Give the policy that a VM is judged by, or None if it is unknown or disabled."""

    def vm(self, vm_id: str) -> Vm | None:
        """Give a VM by its id, or None."""

    def measurement(self, profile: str, digest: bytes) -> Measurement | None:
        """Give the reference value that this MEASUREMENT matches in a profile, or None."""

    def roots(self) -> TrustedRoots:
        """Give AMD's roots and those that the operator added."""


class EndorsementSource(Protocol):
    """Where certificates come from when the evidence carries too few."""

    def find(self, report: bytes, carried: bytes) -> Endorsements:
        """Give every candidate for this report: those carried (a certificate table) and those kept."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Authentic evidence, judged. ``binding`` is TH; the answer is bound to it.

    ``signed_by`` is the verifier's public key that the agent believed its challenge by; ``explained`` tells whether the boot
    is a known one, without which only ``enrol`` gets anything; ``enrol_proof`` is held against ``t0``.
    """

    evidence_sha256: bytes
    session: bytes
    signed_by: bytes
    hello: Hello
    vm: Vm
    claims: Claims
    binding: bytes
    decision: Allow | Deny
    expires_s: int
    explained: bool
    t0: bytes
    enrol_proof: bytes | None


class Pipeline:
    """One verifier's judgement. Its own keys come with each request, since its owner may change them meanwhile."""

    def __init__(self, *, facts: Facts, endorsements: EndorsementSource, session_s: int) -> None:
        """Keep the collaborators; nothing is opened here."""
        self._facts = facts
        self._endorsements = endorsements
        self._session_s = session_s
        self._certificates = Memory(MOST_CERTIFICATES)
        self._logs = Memory(MOST_LOGS)

    def challenge(self, body: bytes, now_s: int, keys: OwnKeys) -> Challenge:
        """Answer a Hello. Raises Malformed, UnsupportedVersion, or NotAuthentic(``vm.enabled``)."""
        hello = messages.decode(messages.Hello, body)
        policy = self._facts.policy(hello.vm_id)
        if policy is None:
            raise NotAuthentic(
                "A VM asks that is not enrolled here, or is disabled.",
                code="vm.enabled",
                expected="the id of an enrolled, enabled VM",
                found=hello.vm_id,
                todo="`kagimori-verifier vm list` shows the VMs; vm_id in agent.toml must be one of them.",
            )
        unbound = messages.Challenge(
            version=messages.VERSION,
            session=b"",
            nonce=secrets.token_bytes(32),
            expires_in=self._session_s,
            pcr_selection=tpm.pcr_selection(policy.quoted_pcrs),
        )
        return token.issue(keys.token, body, unbound, now_s)

    def judge(self, body: bytes, now_s: int, trail: Trail, keys: OwnKeys) -> Judgement:
        """Judge one Evidence, writing every check on ``trail``.

        Raises Malformed and UnsupportedVersion for what cannot be read, NotAuthentic for what cannot be believed;
        database errors pass through.
        """
        # 1 sizes, strict decoding, token authentic and unexpired, own challenge and Hello bound to it
        evidence = messages.decode(messages.Evidence, body)
        hello = messages.decode(messages.Hello, evidence.hello)
        trail.note("message.decode", True, expected="an Evidence and a Hello in their one form", found="both")  # noqa: FBT003 - they were read
        own = require_own(trail, evidence, now_s, keys, self._session_s)
        t0 = transcript.t0(evidence.hello, [(signed.key, signed.challenge) for signed in evidence.challenges])
        # 2 VM known and enabled, purpose allowed, volumes a subset of the VM's
        vm = self._known_vm(trail, hello)
        # 3 the report is genuine
        carried = evidence.certificates or b""
        endorsements = self._endorsements.find(evidence.report, carried)
        snp = verify_report(trail, evidence.report, endorsements, self._facts.roots(), self._certificates)
        # 4 MEASUREMENT is a reference value; it fixes the kind; VMPL exactly as the kind demands
        measurement = self._known_measurement(trail, vm, snp)
        # 5 to 8, by kind
        boot = None
        if measurement.kind == "svsm-vtpm":
            parts = vtpm_parts(trail, evidence, hello)
            boot = _verify_boot(trail, parts, snp.report, t0, vm.references.policy, self._logs)
        else:
            require_no_tpm(trail, evidence, hello)
            verify_direct(trail, snp.report, t0)
        claims = Claims(hello=hello, snp=snp, measurement=measurement, vtpm=boot)
        # from here on the evidence is authentic; all further reasons are gathered and told together
        # 9 acceptable to the owner
        explained = appraise(trail, claims, vm.references, datetime.fromtimestamp(now_s, UTC))
        appraise_volumes(trail, hello.volumes, vm.others, vm.provenance)
        return Judgement(
            evidence_sha256=hashlib.sha256(body).digest(),
            session=own.challenge.session,
            signed_by=own.signed_by,
            hello=hello,
            vm=vm,
            claims=claims,
            binding=transcript.answer_binding(t0, messages.encode(own.challenge), body),
            decision=decide(measurement.kind, trail.checks),
            expires_s=own.session.issued + self._session_s,
            explained=explained,
            t0=t0,
            enrol_proof=None if evidence.enrol_proof is UNSET else evidence.enrol_proof,
        )

    def _known_vm(self, trail: Trail, hello: Hello) -> Vm:
        """Step 2: the VM is known and enabled, may ask for this, and asks for its own volumes only."""
        vm = self._facts.vm(hello.vm_id)
        trail.require(
            "vm.enabled",
            vm is not None and vm.enabled,
            expected="the id of an enrolled, enabled VM",
            found=hello.vm_id + (", disabled" if vm is not None and not vm.enabled else ""),
        )
        assert vm is not None  # noqa: S101 - required just above; tells the type checker
        trail.require(
            "vm.purpose",
            hello.purpose in vm.purposes,
            expected=" or ".join(sorted(vm.purposes)) or "nothing: no purpose is allowed",
            found=hello.purpose,
        )
        _require_volumes(trail, hello, vm)
        return vm

    def _known_measurement(self, trail: Trail, vm: Vm, snp: SnpClaims) -> Measurement:
        """Step 4: MEASUREMENT is a reference value and fixes the kind, never the client's word."""
        report = snp.report
        measurement = self._facts.measurement(vm.profile, report.measurement)
        trail.require(
            "report.measurement",
            measurement is not None,
            expected=f'a reference value of profile "{vm.profile}"',
            found=report.measurement.hex() + (f' ("{measurement.label}")' if measurement else ""),
        )
        assert measurement is not None  # noqa: S101 - required just above; tells the type checker
        trail.require(
            "report.vmpl",
            report.vmpl == VMPL,
            expected=f"VMPL {VMPL}",
            found="a report that the host asked for"
            if report.vmpl == VMPL_HOST_REQUESTED
            else f"VMPL {report.vmpl}",
        )
        if measurement.kind == "svsm-vtpm":
            features = frozenset(measurement.svsm_features)
            trail.require(
                "measurement.svsm-features",
                features == SVSM_FEATURES,
                expected="an SVSM built with FEATURES=" + ",".join(sorted(SVSM_FEATURES)),
                found=",".join(sorted(features)) or "no feature recorded",
            )
        else:
            # It covers initramfs and command line, and with them vm_id: two VMs that share it are one image.
            trail.require(
                "measurement.one-vm",
                measurement.vms == {vm.vm_id},
                expected=f"a measurement that {vm.vm_id} alone may show",
                found=", ".join(sorted(measurement.vms)),
            )
        return measurement


def _require_volumes(trail: Trail, hello: Hello, vm: Vm) -> None:
    """Step 2: volumes of the VM's own; for ``enrol``, none that it has, but for those that nobody has confirmed."""
    asked, enrol = set(hello.volumes), hello.purpose == "enrol"
    kept = vm.volumes | {uuid for uuid, state in vm.others.items() if state != STAGED}
    its_own = vm.volumes | {uuid for uuid, state in vm.others.items() if state == WAITING}
    its_names = ", ".join(sorted(vm.volumes)) or "none"
    trail.require(
        "vm.volumes",
        (not asked & kept if enrol else asked <= its_own)
        and len(asked) == len(hello.volumes)
        and bool(asked or hello.purpose not in {"unlock", "enrol"})
        and (not enrol or len(asked | kept) <= MOST_VOLUMES),
        expected=f"volumes other than {its_names}, each once, {MOST_VOLUMES} with those at most"
        if enrol
        else f"volumes among {its_names}, each once",
        found=", ".join(hello.volumes) or "none",
    )


def _verify_boot(  # noqa: PLR0913 - all that a boot is held against
    trail: Trail, parts: VtpmParts, report: Report, t0: bytes, policy: Policy, logs: Memory
) -> BootClaims:
    """Steps 5 to 8 for ``svsm-vtpm``: manifest, AK, quote, event log."""
    # 5
    ek = verify_manifest(trail, report, t0, parts.manifest, parts.ek_public)
    # 6
    ak_name = verify_ak(trail, parts.ak_public)
    # 7
    vtpm = verify_quote(
        trail,
        ek_public=ek,
        ak_public=parts.ak_public,
        ak_name=ak_name,
        quote=parts.quote,
        pcrs=parts.pcrs,
        qualifying_data=transcript.quote_qualifying_data(t0, report.raw, parts.manifest),
        selection=tpm.pcr_selection(policy.quoted_pcrs),
    )
    # 8 the cap is extended by the agent, after the log has ended; step 9 looks at it
    governed = {index: digest for index, digest in vtpm.pcrs.items() if index != policy.cap_pcr}
    return BootClaims(
        ek_public=vtpm.ek_public,
        ak_name=vtpm.ak_name,
        attest=vtpm.attest,
        pcrs=vtpm.pcrs,
        logged=_verify_log(trail, parts.event_log, governed, logs),
    )


def _verify_log(trail: Trail, raw: bytes, governed: Mapping[int, bytes], logs: Memory) -> LoggedBoot:
    """Step 8. A log that has led to these very values before does so again, and is not read twice."""
    quoted = b"".join(bytes([index]) + digest for index, digest in sorted(governed.items()))
    key = key_of("boot", raw, quoted)
    known: LoggedBoot | None = logs.get(key)
    with trail.step("eventlog.layout", "a crypto-agile event log"):
        log = None if known else eventlog.parse(raw)
    with trail.step("eventlog.replay", "a log that leads to the quoted values"):
        logged = known or LoggedBoot(eventlog.replay_to(log, governed))  # type: ignore[arg-type]  # parsed unless known
    if known is None:
        events = sum(map(len, logged.events.values()))
        logs.keep(key, logged, 2 * len(raw) + _EVENT * events)
    return logged
