"""Careless twins: for each check that is the reading itself, what a verifier without it would do.

``TWINS`` goes by the check's name. A story may bring a twin of its own where one name guards more than one door.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import sqlalchemy as sa
from tests.attacks.bite.blind import Twin
from tpm2_pytss.types import TPMT_PUBLIC, TPMT_SIGNATURE

from kagimori_protocol import messages, tpm
from kagimori_protocol.errors import KagimoriError, Malformed
from kagimori_protocol.snp import FIELDS, REPORT_SIZE, VERSIONS, Report, TcbVersion
from kagimori_verifier import learning, ledger, parts, pipeline, release, token, wrapping
from kagimori_verifier.appraise.policy import VM_OWNED_PCRS
from kagimori_verifier.claims import Measurement, Root
from kagimori_verifier.facts import StoredFacts
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.store import observations, redemptions, schema, vms
from kagimori_verifier.verify import eventlog, snp
from kagimori_verifier.verify.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from kagimori_protocol.messages import Evidence, Hello
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.redemptions import Redemption
    from kagimori_verifier.trail import Trail

TWIN_VM: Final = "web2"
T = TypeVar("T")


def lax_messages(patch: pytest.MonkeyPatch) -> None:
    """Overlook fields that a message does not have, as a lenient JSON reader does."""
    strict = messages._decode

    def decode(kind: type[T], body: bytes, *, versioned: bool) -> T:
        try:
            read: T = strict(kind, body, versioned=versioned)
        except Malformed:
            known = {"type", *getattr(kind, "__struct_fields__", ())}
            kept = {name: value for name, value in json.loads(body).items() if name in known}
            read = strict(kind, msgspec.json.encode(kept), versioned=versioned)
        return read

    patch.setattr(messages, "_decode", decode)


def open_tokens(patch: pytest.MonkeyPatch) -> None:
    """Believe a session token that nobody made: take its content as it stands."""
    strict = token.read

    def read(key: bytes, raw: bytes) -> token.Session:
        try:
            return strict(key, raw)
        except wrapping.BoxBroken:
            nonce, hello, challenge = (raw[at : at + 32] for at in (8, 40, 72))
            return token.Session(int.from_bytes(raw[:8], "big"), nonce, hello, challenge)

    patch.setattr(token, "read", read)


def lax_reports(patch: pytest.MonkeyPatch) -> None:
    """Read the fields that one knows, whatever the version, and overlook the rest."""
    strict = Report.parse

    def parse(raw: bytes) -> Report:
        tidy = bytearray(REPORT_SIZE)
        for at, size in FIELDS.values():
            tidy[at : at + size] = raw[at : at + size]
        version = int.from_bytes(raw[:4], "little")
        tidy[:4] = min(version, max(VERSIONS)).to_bytes(4, "little")
        return replace(strict(bytes(tidy)), raw=bytes(raw))

    patch.setattr(Report, "parse", parse)


def lax_tcbs(patch: pytest.MonkeyPatch) -> None:
    """Overlook bytes where a TCB_VERSION has none."""
    strict = TcbVersion.parse

    def parse(raw: bytes, *, turin: bool) -> TcbVersion:
        tidy = raw[:4] + bytes(3) + raw[7:] if turin else raw[:2] + bytes(4) + raw[6:]
        return strict(tidy, turin=turin)

    patch.setattr(TcbVersion, "parse", parse)


def any_leaf(patch: pytest.MonkeyPatch) -> None:
    """Take any certificate that fits the report for the VCEK's, whatever its name says that it is for."""

    def find(
        _trail: object, report: Report, _signer: str, certificates: Sequence[Certificate]
    ) -> Certificate:
        return next(one for one in certificates if snp._fits(report, one))

    patch.setattr(snp, "_find_vek", find)


def any_root(patch: pytest.MonkeyPatch) -> None:
    """Trust every certificate that signs itself, as if it were AMD's."""
    patch.setattr(TrustedRoots, "get", lambda _self, spki_sha256: Root(spki_sha256, "Milan", "whoever"))


def unsigned_certificates(patch: pytest.MonkeyPatch) -> None:
    """Compare the names in a chain and verify no signature."""
    patch.setattr(Certificate, "require_signed_by", lambda self, _issuer: self)


def any_intermediate(patch: pytest.MonkeyPatch) -> None:
    """Let the intermediate for VLEKs sign VCEKs."""
    patch.setattr(snp, "_require_name", lambda _certificate, _name: None)


def any_measurement(patch: pytest.MonkeyPatch) -> None:
    """Take every MEASUREMENT for an SVSM of the owner's."""

    def measurement(_self: object, _profile: str, digest: bytes) -> Measurement:
        return Measurement(digest, "svsm-vtpm", "whatever", ("vtpm",), frozenset())

    patch.setattr(StoredFacts, "measurement", measurement)


def absent_log_is_empty(patch: pytest.MonkeyPatch) -> None:
    """Take an event log that was not sent for one that says nothing."""
    strict = parts.vtpm_parts

    def careless(trail: Trail, evidence: Evidence, hello: Hello) -> parts.VtpmParts:
        if evidence.event_log is msgspec.UNSET:
            evidence = msgspec.structs.replace(evidence, event_log=b"")
        return strict(trail, evidence, hello)

    patch.setattr(pipeline, "vtpm_parts", careless)


def any_ek(patch: pytest.MonkeyPatch) -> None:
    """Take any public area of the right size for an EK, whatever its template allows to do with it."""
    patch.setattr(tpm, "require_ek_l1", lambda raw: raw)


def lax_publics(patch: pytest.MonkeyPatch) -> None:
    """Read a public area from its start and overlook what comes after it."""
    strict, name_of = tpm.parse_public, tpm.object_name

    def parse(raw: bytes) -> TPMT_PUBLIC:
        try:
            return strict(raw)
        except Malformed:
            return TPMT_PUBLIC.unmarshal(raw)[0]

    patch.setattr(tpm, "parse_public", parse)
    patch.setattr(tpm, "object_name", lambda public: name_of(bytes(parse(public).marshal())))


def lax_quotes(patch: pytest.MonkeyPatch) -> None:
    """Overlook the marks by which a TPM tells what it made itself, and what of."""
    strict = tpm.Attest.parse
    marks = b"\xffTCG\x80\x18"
    patch.setattr(tpm.Attest, "parse", lambda raw: strict(marks + raw[len(marks) :]))


def lax_signatures(patch: pytest.MonkeyPatch) -> None:
    """Read a signature from its start and overlook what comes after it."""
    patch.setattr(tpm, "parse_signature", lambda raw: TPMT_SIGNATURE.unmarshal(raw)[0])


def lax_logs(patch: pytest.MonkeyPatch) -> None:
    """Read a log as far as it can be read."""
    strict = eventlog.parse

    def parse(raw: bytes) -> eventlog.EventLog:
        for end in range(len(raw), 0, -1):
            try:
                return strict(raw[:end])
            except KagimoriError:
                continue
        return eventlog.EventLog((eventlog.SHA256,), (), 0)

    patch.setattr(eventlog, "parse", parse)


def any_log(patch: pytest.MonkeyPatch) -> None:
    """Believe a log without replaying it."""

    def replay_to(log: eventlog.EventLog, quoted: dict[int, bytes]) -> dict[int, tuple[eventlog.Event, ...]]:
        extends = [event for event in log.events if event.type != eventlog.EV_NO_ACTION]
        return {pcr: tuple(event for event in extends if event.pcr == pcr) for pcr in quoted}

    patch.setattr(eventlog, "replay_to", replay_to)


def every_vms_volumes(patch: pytest.MonkeyPatch) -> None:
    """Look a volume's key up by its UUID, and not by whose it is."""

    def volumes(txn: Txn, _vm_id: str) -> list[vms.VolumeRow]:
        return [vms.VolumeRow(**row._mapping) for row in txn.execute(sa.select(schema.volume))]

    patch.setattr(release, "vms", SimpleNamespace(volumes=volumes))


def unbound_boxes(patch: pytest.MonkeyPatch) -> None:
    """Unwrap a key for one VM that was wrapped for another."""
    strict = UnlockKeys.unwrap

    def unwrap(self: UnlockKeys, wrapped: bytes, vm_id: str, uuid: str, version: int) -> bytes:
        try:
            return strict(self, wrapped, vm_id, uuid, version)
        except wrapping.BoxBroken:
            return strict(self, wrapped, TWIN_VM, uuid, version)

    patch.setattr(UnlockKeys, "unwrap", unwrap)


def forgotten_sessions(patch: pytest.MonkeyPatch) -> None:
    """Look for a session that is being answered, and forget it once it has its answer."""
    found = redemptions.find

    def find(txn: Txn, session_sha256: bytes) -> Redemption | None:
        row = found(txn, session_sha256)
        return None if row is None or row.answer is not None else row

    patch.setattr(redemptions, "find", find)


def overwritten_sessions(patch: pytest.MonkeyPatch) -> None:
    """Let a second use of a session take the first one's place in the database."""
    insert = redemptions.insert

    def insert_over(txn: Txn, row: Redemption) -> None:
        used = schema.redemption.c.session_sha256 == row.session_sha256
        txn.execute(sa.delete(schema.redemption).where(used))
        insert(txn, row)

    patch.setattr(redemptions, "insert", insert_over)


def any_mac(patch: pytest.MonkeyPatch) -> None:
    """Believe every Confirm."""
    patch.setattr(release, "hmac", SimpleNamespace(compare_digest=lambda _expected, _found: True))


def no_order(patch: pytest.MonkeyPatch) -> None:
    """Let a later Confirm undo an earlier one."""
    patch.setattr(release, "_FINAL", frozenset())


def absent_key_is_zero(patch: pytest.MonkeyPatch) -> None:
    """Take a confirm key that was never made for one that is empty."""
    found, unwrap = redemptions.find, UnlockKeys.unwrap_confirm_key

    def find(txn: Txn, session_sha256: bytes) -> Redemption | None:
        row = found(txn, session_sha256)
        return row if row is None or row.confirm_key is not None else replace(row, confirm_key=b"")

    patch.setattr(redemptions, "find", find)
    patch.setattr(
        UnlockKeys,
        "unwrap_confirm_key",
        lambda self, wrapped, session: unwrap(self, wrapped, session) if wrapped else bytes(32),
    )


def unconfirmed_counts(patch: pytest.MonkeyPatch) -> None:
    """Learn from what no Confirm has proved."""
    get = observations.get

    def confirmed(txn: Txn, session: str) -> observations.Observation | None:
        seen = get(txn, session)
        return None if seen is None else replace(seen, confirmed=True)

    patch.setattr(observations, "get", confirmed)


def any_profile(patch: pytest.MonkeyPatch) -> None:
    """Learn for the profile that a VM has by now what it showed under another."""
    get = observations.get

    def of_today(txn: Txn, session: str) -> observations.Observation | None:
        seen = get(txn, session)
        vm = None if seen is None else vms.get(txn, seen.vm_id)
        return seen if seen is None or vm is None else replace(seen, profile=vm.profile)

    patch.setattr(observations, "get", of_today)


def shared_images(patch: pytest.MonkeyPatch) -> None:
    """Keep in a shared profile what belongs to one VM's initramfs."""
    patch.setattr(learning, "VM_OWNED_PCRS", dict.fromkeys(VM_OWNED_PCRS, frozenset()))


def unchained_ledger(patch: pytest.MonkeyPatch) -> None:
    """Take the hash that stands in a line for the hash of what it says."""
    patch.setattr(ledger, "_expected_hash", lambda _previous, row: row.hash)


TWINS: Final[dict[str, Twin]] = {
    "message.decode": lax_messages,
    "session.token": open_tokens,
    "report.layout": lax_reports,
    "report.tcb-layout": lax_tcbs,
    "endorsement.found": any_leaf,
    "endorsement.root": any_root,
    "endorsement.chain": unsigned_certificates,
    "report.measurement": any_measurement,
    "evidence.parts": absent_log_is_empty,
    "manifest.ek": any_ek,
    "ak.layout": lax_publics,
    "quote.layout": lax_quotes,
    "quote.signature-layout": lax_signatures,
    "eventlog.layout": lax_logs,
    "eventlog.replay": any_log,
    "volume.removed": every_vms_volumes,
    "box.broken": unbound_boxes,
    "session.unused": forgotten_sessions,
    "session.raced": overwritten_sessions,
    "confirm.mac": any_mac,
    "confirm.order": no_order,
    "confirm.session": absent_key_is_zero,
    "accept.unconfirmed": unconfirmed_counts,
    "accept.profile": any_profile,
    "reference.vm-owned": shared_images,
    "ledger.broken": unchained_ledger,
}
