"""The vTPM: an EK that an SVSM vouches for, a fresh AK, a quote, and a credential opened with both.

Commands go through ESAPI (tpm2-pytss). Every key and session is flushed whatever happens: a TPM without a
resource manager has room for three objects. No command or answer here comes near the 4 KiB page that an
SVSM's vTPM takes.

The EK is the primary of the TCG's template L-1, so it is the key in the SVSM's manifest. The AK is a primary
too, made anew for each attempt by random bytes in its template's ``unique`` (an input to its derivation), and
in the endorsement hierarchy, where a quote shows resetCount and restartCount as they are. It is ECDSA over
P-256: with swtpm making one takes 1.5 ms and a quote 1 ms, against 23 to 80 ms (a search for primes) and 4 ms
with RSA 2048, which does no more. Source: TPM 2.0 Library part 3; TCG EK Credential Profile 2.5, section
B.3.3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.ESAPI import ESAPI
from tpm2_pytss.TSS2_Exception import TSS2_Exception
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMS_ECC_POINT,
    TPMS_PCR_SELECTION,
    TPMT_HA,
    TPMT_PUBLIC,
    TPMU_HA,
)

from kagimori_agent.devices.tpm_errors import explain
from kagimori_agent.devices.tpm_places import DRIVER, Place, by_driver, read_event_log
from kagimori_protocol.errors import HardwareError, Malformed, UsageError
from kagimori_protocol.tpm import (
    AK_REQUIRED,
    EK_TEMPLATE_L1,
    PCR_COUNT,
    PCR_SELECT_SIZE,
    QUALIFYING_SIZE,
    Attest,
    require_ek_l1,
    selected_pcrs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Tss: TypeAlias = Any
"""Something of tpm2-pytss, whose annotations do not hold (a constant of ESYS_TR is no ESYS_TR to mypy)."""

SHA256: Final = int(TPM2_ALG.SHA256)
DIGEST_SIZE: Final = 32

RANDOM_LIMIT: Final = 256
"""Bytes of one ``random`` call: several keys' worth, and at most a few commands."""

PCR_ATTEMPTS: Final = 5
"""How often PCRs are read anew because something extended one meanwhile; an initramfs has few who do."""

_COORDINATE_SIZE: Final = 32
_AK_TEMPLATE: Final = "ecc256:ecdsa-sha256:null"
_PCR_READ_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote and what it speaks of.

    ``attest`` is the TPMS_ATTEST and ``signature`` the marshalled TPMT_SIGNATURE, both as the TPM gave them;
    ``pcrs`` the SHA-256 values of the selection by ascending index, which hash to the quote's pcrDigest.
    """

    attest: bytes
    signature: bytes
    pcrs: list[tuple[int, bytes]]


def open_vtpm(
    *,
    driver: str = DRIVER,
    tcti: str | None = None,
    event_log: Path | None = None,
    root: Path = Path("/"),
) -> Vtpm:
    """Open the one TPM with this driver, or the one behind ``tcti`` with the event log named beside it.

    Raises ImageError, HardwareError, UsageError.
    """
    if tcti is None:
        return Vtpm(by_driver(driver, root), root)
    if event_log is None:
        raise UsageError(
            "A TPM that is named by its TCTI needs an event log's path too.",
            code="tpm.event-log",
            expected="event_log",
            found="none",
            todo="Set event_log beside tcti in agent.toml.",
        )
    return Vtpm(Place(name=tcti, driver="", tcti=tcti, event_log=event_log), root)


class Vtpm:
    """One open TPM. Use as a context manager; leaving it flushes the keys and closes the device."""

    def __init__(self, place: Place, root: Path = Path("/")) -> None:
        """Open the TPM at ``place``. Raises ImageError or HardwareError."""
        os.environ.setdefault("TSS2_LOG", "all+none")  # its text is in our errors; stderr is a console here
        self.place = place
        self._root = root
        self._ek: Tss = None
        self._ak: Tss = None
        tcti = place.require_tcti()
        with self._explained("opening the TPM"):
            self._esapi: Tss = ESAPI(tcti)

    def __enter__(self) -> Self:
        """Give the TPM itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush the keys and close."""
        self.close()

    def close(self) -> None:
        """Flush the keys and close the device; a second call does nothing."""
        if not self._esapi.is_closed():
            self._flush_keys()
            self._esapi.close()

    def make_keys(self) -> tuple[bytes, bytes]:
        """Make the EK and a fresh AK, in place of earlier ones; give both TPMT_PUBLICs."""
        self._flush_keys()
        template, _ = TPMT_PUBLIC.unmarshal(EK_TEMPLATE_L1)
        self._ek, ek_public = self._create_primary(template, "TPM2_CreatePrimary (EK)")
        try:
            require_ek_l1(ek_public)
        except Malformed as error:
            raise HardwareError(
                "The TPM made another EK than the template asks for.",
                code="tpm.ek",
                expected=error.expected,
                found=error.found,
                todo="Use an SVSM whose vTPM is the TPM 2.0 reference code, as COCONUT's is.",
            ) from error
        ak = TPMT_PUBLIC.parse(_AK_TEMPLATE, objectAttributes=AK_REQUIRED | TPMA_OBJECT.USERWITHAUTH)
        ak.unique.ecc = TPMS_ECC_POINT(x=os.urandom(_COORDINATE_SIZE), y=os.urandom(_COORDINATE_SIZE))
        self._ak, ak_public = self._create_primary(ak, "TPM2_CreatePrimary (AK)")
        return ek_public, ak_public

    def random(self, count: int) -> bytes:
        """Return 1 to 256 random bytes, to be mixed with others. Raises HardwareError, UsageError."""
        if not 1 <= count <= RANDOM_LIMIT:
            raise UsageError(
                "Too many random bytes.", code="tpm.random", expected=f"1 to {RANDOM_LIMIT}", found=str(count)
            )
        taken = b""
        while len(taken) < count:
            with self._explained("TPM2_GetRandom"):
                part = bytes(self._esapi.get_random(min(count - len(taken), DIGEST_SIZE)))
            if not part or len(taken) + len(part) > count:
                raise HardwareError(
                    "The TPM gave another number of random bytes than asked for.",
                    code="tpm.random",
                    expected=f"1 to {count - len(taken)}",
                    found=str(len(part)),
                    todo="Start the VM again; if it happens again, its vTPM is broken.",
                )
            taken += part
        return taken

    def quote(self, qualifying: bytes, selection: bytes) -> Quote:
        """Quote a selection (marshalled TPML_PCR_SELECTION of SHA-256) with 32 bytes of qualifyingData.

        The values read must hash to what was quoted; if a PCR was extended meanwhile, both are taken anew, a
        few times. Raises Malformed (the selection, which came from a verifier), HardwareError, UsageError.
        """
        if len(qualifying) != QUALIFYING_SIZE:
            raise UsageError(
                "qualifyingData has the wrong size; it is never padded or cut.",
                code="tpm.qualifying",
                expected=f"{QUALIFYING_SIZE} bytes",
                found=f"{len(qualifying)} bytes",
            )
        indices = selected_pcrs(selection)
        if not indices:  # a quote of nothing proves nothing
            raise Malformed(
                "A challenge asks for a quote of no PCR.",
                code="pcr-selection.empty",
                expected="at least one PCR",
                found="none",
            )
        ak = self._require_key(self._ak)
        select, _ = TPML_PCR_SELECTION.unmarshal(selection)
        for _ in range(PCR_ATTEMPTS):
            pcrs = self.read_pcrs(indices)
            with self._explained("TPM2_Quote"):
                attest, signature = self._esapi.quote(ak, select, qualifying)
                quote = Quote(bytes(attest), bytes(signature.marshal()), pcrs)
            read = hashlib.sha256(b"".join(value for _, value in pcrs)).digest()
            if _digest_quoted(quote.attest, qualifying, selection) == read:
                return quote
        raise HardwareError(
            "The PCRs that were read are not the ones that were quoted.",
            code="tpm.pcr-digest",
            expected="SHA-256 over the values equals the quote's pcrDigest",
            found=f"another digest, {PCR_ATTEMPTS} times",
            todo="Find what keeps extending PCRs while the agent runs.",
        )

    def activate(self, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Open a credential made for this EK and this AK; return its secret.

        Takes the marshalled TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET. The EK's policy is PolicyA:
        PolicySecret(TPM_RH_ENDORSEMENT) with the hierarchy's empty password. Raises Malformed, HardwareError
        ("tpm.credential" when it was made for other keys).
        """
        credential = _strictly(TPM2B_ID_OBJECT, id_object)
        secret = _strictly(TPM2B_ENCRYPTED_SECRET, encrypted_secret)
        ek, ak = self._require_key(self._ek), self._require_key(self._ak)
        with self._policy_session() as session:
            with self._explained("TPM2_PolicySecret"):
                self._esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, expiration=0)
            with self._explained("TPM2_ActivateCredential"):
                return bytes(
                    self._esapi.activate_credential(
                        ak, ek, credential, secret, session1=ESYS_TR.PASSWORD, session2=session
                    )
                )

    def read_pcrs(self, indices: Iterable[int], bank: int = SHA256) -> list[tuple[int, bytes]]:
        """Read PCRs of one bank at one moment, as (index, value) by ascending index. Raises HardwareError."""
        wanted = sorted(set(indices))
        _require_pcrs(wanted)
        for _ in range(PCR_ATTEMPTS):
            values: dict[int, bytes] = {}
            counters: set[int] = set()
            while missing := [index for index in wanted if index not in values]:
                counter, part = self._read_some(missing[:_PCR_READ_MOST], bank)
                counters.add(counter)
                values.update(part)
            if len(counters) <= 1:
                return sorted(values.items())
        raise HardwareError(
            "PCRs keep changing while they are read.",
            code="tpm.pcr-counter",
            expected="one pcrUpdateCounter over all reads",
            found=f"another, {PCR_ATTEMPTS} times",
            todo="Find what keeps extending PCRs while the agent runs.",
        )

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend one PCR of the SHA-256 bank by a digest of 32 bytes. Raises HardwareError, UsageError."""
        _require_pcrs([pcr])
        if len(digest) != DIGEST_SIZE:
            raise UsageError(
                "A digest has the wrong size.",
                code="tpm.digest",
                expected="32 bytes",
                found=f"{len(digest)} bytes",
            )
        values = TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))])
        with self._explained("TPM2_PCR_Extend"):
            self._esapi.pcr_extend(ESYS_TR(pcr), values)

    def measure(self, pcr: int, data: bytes) -> None:
        """Extend one PCR of *every* active bank by that bank's own hash of ``data`` (TPM2_PCR_Event)."""
        _require_pcrs([pcr])
        with self._explained("TPM2_PCR_Event"):
            self._esapi.pcr_event(ESYS_TR(pcr), data)

    def active_banks(self, pcr: int) -> list[int]:
        """List the hash algorithms (TPM2_ALG numbers) whose banks have this PCR. Raises HardwareError."""
        _require_pcrs([pcr])
        with self._explained("TPM2_GetCapability (PCRs)"):
            _, data = self._esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
            selections = list(data.data.assignedPCR)
        return [int(bank.hash) for bank in selections if pcr in _indices(bank)]

    def event_log(self) -> bytes:
        """Read the firmware's event log. Raises as ``read_event_log``."""
        return read_event_log(self.place.event_log, self._root)

    def _create_primary(self, template: Tss, command: str) -> tuple[Tss, bytes]:
        with self._explained(command):
            made = self._esapi.create_primary(None, TPM2B_PUBLIC(publicArea=template), ESYS_TR.ENDORSEMENT)
        return made[0], bytes(made[1].publicArea.marshal())

    def _read_some(self, indices: list[int], bank: int) -> tuple[int, dict[int, bytes]]:
        bits = sum(1 << index for index in indices)
        asked = TPMS_PCR_SELECTION(
            hash=TPM2_ALG(bank),
            sizeofSelect=PCR_SELECT_SIZE,
            pcrSelect=bits.to_bytes(PCR_SELECT_SIZE, "little"),
        )
        with self._explained("TPM2_PCR_Read"):
            counter, selected, digests = self._esapi.pcr_read(TPML_PCR_SELECTION([asked]))
            given = [index for selection in selected for index in _indices(selection)]
            values = [bytes(digest) for digest in digests]
        if not given or len(given) != len(values) or not set(given) <= set(indices):
            raise HardwareError(
                "The TPM does not give the PCRs that were asked for.",
                code="tpm.pcr-bank",
                expected=f"PCRs {indices} of the bank with TPM2_ALG 0x{bank:04x}",
                found=f"PCRs {given}, {len(values)} values",
                todo="Use a vTPM with an active SHA-256 bank.",
            )
        return int(counter), dict(zip(given, values, strict=True))

    @contextlib.contextmanager
    def _policy_session(self) -> Iterator[Tss]:
        with self._explained("TPM2_StartAuthSession"):
            session = self._esapi.start_auth_session(
                ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256
            )
        try:
            yield session
        finally:
            self._flush(session)

    def _require_key(self, handle: Tss) -> Tss:
        if handle is None:
            raise UsageError("The TPM's keys are not made yet.", code="tpm.no-keys", expected="make_keys()")
        return handle

    def _flush_keys(self) -> None:
        keys, self._ek, self._ak = (self._ak, self._ek), None, None
        for handle in keys:
            if handle is not None:
                self._flush(handle)

    def _flush(self, handle: Tss) -> None:
        # A TPM that cannot flush has failed before, or will at the next command, and is told of there.
        with contextlib.suppress(TSS2_Exception):
            self._esapi.flush_context(handle)

    @contextlib.contextmanager
    def _explained(self, command: str) -> Iterator[None]:
        """Turn what the TSS raises into named errors."""
        try:
            yield
        except TSS2_Exception as error:
            raise explain(error.rc, str(error), command, self.place.name) from error


def _digest_quoted(raw: bytes, qualifying: bytes, selection: bytes) -> bytes:
    """Return the quote's pcrDigest if it answers this request, or raise HardwareError."""
    try:
        attest = Attest.parse(raw)
    except Malformed as error:
        raise HardwareError(
            "The TPM's quote cannot be read.", code="tpm.quote", expected=error.expected, found=error.found
        ) from error
    if (attest.extra_data, attest.pcr_select) != (qualifying, selection):
        raise HardwareError(
            "The TPM quoted something else than it was asked for.",
            code="tpm.quote",
            expected=f"qualifyingData {qualifying.hex()}, selection {selection.hex()}",
            found=f"qualifyingData {attest.extra_data.hex()}, selection {attest.pcr_select.hex()}",
            todo="Use a vTPM with an active SHA-256 bank of 24 PCRs.",
        )
    return attest.pcr_digest


def _indices(selection: Tss) -> list[int]:
    bits = int.from_bytes(bytes(selection.pcrSelect)[: int(selection.sizeofSelect)], "little")
    return [index for index in range(PCR_COUNT) if bits >> index & 1]


def _require_pcrs(indices: list[int]) -> None:
    if not indices or min(indices) < 0 or max(indices) >= PCR_COUNT:
        raise UsageError(
            "There are no such PCRs.", code="tpm.pcr", expected=f"0 to {PCR_COUNT - 1}", found=str(indices)
        )


def _strictly(structure: Tss, raw: bytes) -> Tss:
    """Unmarshal all of ``raw``, which a verifier sent, or raise Malformed."""
    try:
        value, used = structure.unmarshal(raw)
        found = f"{used} of {len(raw)} bytes used"
    except TSS2_Exception as error:
        value, used, found = None, -1, str(error)
    if used != len(raw):
        expected = f"one {structure.__name__} and nothing after it"
        raise Malformed(
            "A credential cannot be read.", code="credential.layout", expected=expected, found=found
        )
    return value
