"""The vTPM door against a real swtpm."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.ESAPI import ESAPI
from tpm2_pytss.TCTI import PyTCTI
from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.TSS2_Exception import TSS2_Exception
from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT, TPM2B_PUBLIC, TPMT_PUBLIC

from kagimori_agent.cap import CAP_DATA
from kagimori_agent.devices import vtpm as vtpm_module
from kagimori_agent.devices.vtpm import PCR_ATTEMPTS, RANDOM_LIMIT, SHA256, Tss, Vtpm, open_vtpm
from kagimori_protocol.errors import HardwareError, Malformed, UsageError
from kagimori_protocol.tpm import (
    AK_REQUIRED,
    EK_TEMPLATE_L1,
    NO_PCRS,
    Attest,
    make_credential,
    object_name,
    parse_public,
    parse_signature,
    pcr_selection,
    require_ek_l1,
)
from kagimori_simulator.vtpm import Vtpm as SimulatedVtpm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

QUALIFYING = bytes(range(32))
ALL = pcr_selection(range(24))
SVSM_PAGE = 4096
TRANSIENT, LOADED_SESSIONS, SAVED_SESSIONS = 0x80000000, 0x02000000, 0x03000000


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[SimulatedVtpm]:
    """Give a fresh TPM."""
    with SimulatedVtpm.start(tmp_path) as started:
        started.event_log_path.parent.mkdir(parents=True, exist_ok=True)
        started.event_log_path.write_bytes(b"a log")
        yield started


@pytest.fixture
def vtpm(swtpm: SimulatedVtpm) -> Iterator[Vtpm]:
    """Open it as the agent does, by its TCTI."""
    with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
        yield opened


def handles(swtpm: SimulatedVtpm) -> list[int]:
    """List what is left in the TPM: objects, loaded sessions, saved sessions."""
    left: list[int] = []
    with ESAPI(swtpm.tcti) as esapi:
        for first in (TRANSIENT, LOADED_SESSIONS, SAVED_SESSIONS):
            _, data = esapi.get_capability(TPM2_CAP.HANDLES, first, 32)
            left += [int(handle) for handle in data.data.handles]
    return left


def credential_for(ek_public: bytes, ak_public: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Do what the verifier does."""
    return make_credential(ek_public, object_name(ak_public), secret)


def test_the_ek_is_of_template_l1_and_the_same_every_time(vtpm: Vtpm) -> None:
    """So it equals the one that an SVSM puts into its manifest."""
    first, _ = vtpm.make_keys()
    second, _ = vtpm.make_keys()
    assert first == second == require_ek_l1(first)


def test_the_ek_template_is_the_tcgs(vectors: Path) -> None:
    """The template of our constant is byte for byte the published one."""
    assert (vectors / "tpm/ek-template-rsa2048-L1.bin").read_bytes() == EK_TEMPLATE_L1


def test_the_ak_is_a_restricted_signing_key_that_never_was_elsewhere(vtpm: Vtpm) -> None:
    """Exactly the attributes that make its quotes believable, and ECDSA over P-256 with SHA-256."""
    _, ak_public = vtpm.make_keys()
    ak = parse_public(ak_public)
    assert int(ak.objectAttributes) == int(AK_REQUIRED | TPMA_OBJECT.USERWITHAUTH)
    assert ak.parameters.eccDetail.scheme.scheme == TPM2_ALG.ECDSA
    assert ak.parameters.eccDetail.scheme.details.ecdsa.hashAlg == TPM2_ALG.SHA256
    assert bytes(ak.authPolicy) == b""


def test_every_attempt_has_an_ak_of_its_own(vtpm: Vtpm) -> None:
    """Nothing that was quoted or sealed for an earlier attempt fits a later one."""
    assert len({vtpm.make_keys()[1] for _ in range(8)}) == 8


def test_a_clone_of_the_seeds_has_another_ak(tmp_path: Path) -> None:
    """The random bytes come from the guest, so a host that copies the TPM's state does not copy the AK."""
    eks, aks = set(), set()
    for name in ("one", "two"):
        with (
            SimulatedVtpm.start(tmp_path / name, state=tmp_path / "state") as started,
            open_vtpm(tcti=started.tcti, event_log=tmp_path) as opened,
        ):
            ek_public, ak_public = opened.make_keys()
            eks.add(ek_public)
            aks.add(ak_public)
    assert (len(eks), len(aks)) == (1, 2)


def test_a_quote_is_signed_by_the_ak_over_what_was_asked(vtpm: Vtpm) -> None:
    """QualifyingData and selection come back, the values hash to the digest, the signature verifies."""
    _, ak_public = vtpm.make_keys()
    vtpm.extend(3, b"\x05" * 32)
    quote = vtpm.quote(QUALIFYING, ALL)
    attest = Attest.parse(quote.attest)
    assert (attest.extra_data, attest.pcr_select) == (QUALIFYING, ALL)
    assert [index for index, _ in quote.pcrs] == list(range(24))
    assert hashlib.sha256(b"".join(value for _, value in quote.pcrs)).digest() == attest.pcr_digest
    ak, signed = parse_public(ak_public), parse_signature(quote.signature)
    point, signature = ak.unique.ecc, signed.signature.ecdsa
    ec.EllipticCurvePublicNumbers(
        int.from_bytes(bytes(point.x)), int.from_bytes(bytes(point.y)), ec.SECP256R1()
    ).public_key().verify(
        utils.encode_dss_signature(
            int.from_bytes(bytes(signature.signatureR)), int.from_bytes(bytes(signature.signatureS))
        ),
        quote.attest,
        ec.ECDSA(hashes.SHA256()),
    )


def test_a_quote_tells_the_counters_as_they_are(vtpm: Vtpm) -> None:
    """A key outside the endorsement hierarchy would show them obfuscated."""
    vtpm.make_keys()
    attest = Attest.parse(vtpm.quote(QUALIFYING, ALL).attest)
    assert attest.reset_count < 100
    assert attest.restart_count < 100


def test_more_pcrs_than_one_command_gives_are_all_read(vtpm: Vtpm) -> None:
    """TPM2_PCR_Read answers 8 at most; the values are of one moment all the same."""
    for index in range(16):
        vtpm.extend(index, bytes([index]) * 32)
    values = vtpm.read_pcrs(range(16))
    assert values == [
        (index, hashlib.sha256(bytes(32) + bytes([index]) * 32).digest()) for index in range(16)
    ]
    assert vtpm.read_pcrs([9, 2, 9]) == [values[2], values[9]]


@pytest.mark.parametrize(
    "selection", [NO_PCRS, b"", b"\0", ALL + b"\0", bytes.fromhex("00000001000403ffffff")]
)
def test_a_selection_that_proves_nothing_is_refused(vtpm: Vtpm, selection: bytes) -> None:
    """No PCR, another bank, or trailing bytes: a verifier may not ask so, nor may somebody between."""
    vtpm.make_keys()
    with pytest.raises(Malformed):
        vtpm.quote(QUALIFYING, selection)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_qualifying_data_is_never_padded_or_cut(vtpm: Vtpm, size: int) -> None:
    """It is T1, 32 bytes."""
    vtpm.make_keys()
    with pytest.raises(UsageError):
        vtpm.quote(bytes(size), ALL)


def test_a_pcr_that_moves_once_between_reading_and_quoting_is_read_again(
    vtpm: Vtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values returned are those that were quoted."""
    vtpm.make_keys()
    _disturb(vtpm, monkeypatch, times=1)
    quote = vtpm.quote(QUALIFYING, ALL)
    assert dict(quote.pcrs)[10] == hashlib.sha256(bytes(32) + b"\x01" * 32).digest()


def test_a_pcr_that_keeps_moving_is_a_named_error(vtpm: Vtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent gives up after a few times, instead of sending values that do not fit."""
    vtpm.make_keys()
    _disturb(vtpm, monkeypatch, times=PCR_ATTEMPTS)
    with pytest.raises(HardwareError) as caught:
        vtpm.quote(QUALIFYING, ALL)
    assert caught.value.code == "tpm.pcr-digest"


def _disturb(vtpm: Vtpm, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let something else extend PCR 10 after each of the first ``times`` readings."""
    read = vtpm.read_pcrs
    left = [None] * times

    def then_extend(indices: Iterable[int], bank: int = SHA256) -> list[tuple[int, bytes]]:
        values = read(indices, bank)
        if left:
            left.pop()
            vtpm.extend(10, b"\x01" * 32)
        return values

    monkeypatch.setattr(vtpm, "read_pcrs", then_extend)


def test_pcrs_that_move_between_two_reads_are_read_anew(vtpm: Vtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """PcrUpdateCounter shows it; values of two moments are never mixed."""
    some = vtpm._read_some
    calls = []

    def then_extend(indices: list[int], bank: int) -> tuple[int, dict[int, bytes]]:
        answer = some(indices, bank)
        calls.append(indices)
        if len(calls) == 1:
            vtpm.extend(0, b"\x01" * 32)
        return answer

    monkeypatch.setattr(vtpm, "_read_some", then_extend)
    assert dict(vtpm.read_pcrs(range(16)))[0] != bytes(32)
    assert len(calls) == 4


def test_a_bank_that_the_tpm_does_not_have_is_a_named_error(vtpm: Vtpm) -> None:
    """No value is ever made up for a PCR that the TPM does not give."""
    with pytest.raises(HardwareError) as caught:
        vtpm.read_pcrs([0], int(TPM2_ALG.SHA3_256))
    assert caught.value.code.startswith("tpm.")


def test_a_credential_for_this_ek_and_this_ak_opens(vtpm: Vtpm, swtpm: SimulatedVtpm) -> None:
    """The secret arrives whole, and afterwards nothing is left in the TPM."""
    secret = os.urandom(32)
    ek_public, ak_public = vtpm.make_keys()
    assert vtpm.activate(*credential_for(ek_public, ak_public, secret)) == secret
    vtpm.close()
    assert handles(swtpm) == []


def test_a_credential_for_an_earlier_ak_does_not_open(vtpm: Vtpm, swtpm: SimulatedVtpm) -> None:
    """The name is bound in; sessions are flushed although the command failed."""
    ek_public, ak_public = vtpm.make_keys()
    stale = credential_for(ek_public, ak_public, bytes(32))
    vtpm.make_keys()
    with pytest.raises(HardwareError) as caught:
        vtpm.activate(*stale)
    assert caught.value.code == "tpm.credential"
    assert "0x000001df" in str(caught.value.found)
    assert [handle for handle in handles(swtpm) if handle < TRANSIENT] == []
    assert len(handles(swtpm)) == 2
    vtpm.close()
    assert handles(swtpm) == []


def test_a_credential_for_another_ek_does_not_open(vtpm: Vtpm, tmp_path: Path) -> None:
    """Another TPM's EK cannot be stood in for."""
    with (
        SimulatedVtpm.start(tmp_path / "other") as other,
        open_vtpm(tcti=other.tcti, event_log=tmp_path) as opened,
    ):
        other_ek, _ = opened.make_keys()
    ek_public, ak_public = vtpm.make_keys()
    assert other_ek != ek_public
    with pytest.raises(HardwareError):
        vtpm.activate(*credential_for(other_ek, ak_public, bytes(32)))


def test_an_ak_of_which_the_tpm_knows_only_the_public_part_cannot_activate(
    vtpm: Vtpm, swtpm: SimulatedVtpm, tmp_path: Path
) -> None:
    """Who names somebody else's AK cannot load more than its public part, and the TPM refuses to use that."""
    with (
        SimulatedVtpm.start(tmp_path / "other") as other,
        open_vtpm(tcti=other.tcti, event_log=tmp_path) as opened,
    ):
        _, foreign_ak = opened.make_keys()
    ek_public, _ = vtpm.make_keys()
    id_object, encrypted_secret = credential_for(ek_public, foreign_ak, bytes(32))
    vtpm.close()
    with ESAPI(swtpm.tcti) as esapi:
        template, _ = TPMT_PUBLIC.unmarshal(EK_TEMPLATE_L1)
        ek, *_ = esapi.create_primary(None, TPM2B_PUBLIC(publicArea=template), ESYS_TR(ESYS_TR.ENDORSEMENT))
        ak = esapi.load_external(TPM2B_PUBLIC(publicArea=parse_public(foreign_ak)))
        none = ESYS_TR(ESYS_TR.NONE)
        session = esapi.start_auth_session(
            none, none, TPM2_SE(TPM2_SE.POLICY), None, TPM2_ALG(TPM2_ALG.SHA256)
        )
        esapi.policy_secret(ESYS_TR(ESYS_TR.ENDORSEMENT), session, expiration=0)
        with pytest.raises(TSS2_Exception) as caught:
            esapi.activate_credential(
                ak,
                ek,
                TPM2B_ID_OBJECT.unmarshal(id_object)[0],
                TPM2B_ENCRYPTED_SECRET.unmarshal(encrypted_secret)[0],
                session1=ESYS_TR(ESYS_TR.PASSWORD),
                session2=session,
            )
        assert caught.value.rc == 0x12F
        for handle in (session, ak, ek):
            esapi.flush_context(handle)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(id_object=st.binary(max_size=200), encrypted_secret=st.binary(max_size=700))
@example(id_object=b"", encrypted_secret=b"")
@example(id_object=b"\0\0", encrypted_secret=b"\0\0")
def test_any_bytes_in_place_of_a_credential_are_a_named_error(
    vtpm: Vtpm, id_object: bytes, encrypted_secret: bytes
) -> None:
    """Whatever a verifier sends, the agent says what it was."""
    if vtpm._ak is None:
        vtpm.make_keys()
    with pytest.raises((Malformed, HardwareError)):
        vtpm.activate(id_object, encrypted_secret)


@pytest.mark.parametrize(
    "command", ["create_primary", "start_auth_session", "policy_secret", "activate_credential"]
)
def test_nothing_is_left_in_the_tpm_whichever_command_fails(
    vtpm: Vtpm, swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A TPM without a resource manager has room for three objects, and the next attempt needs two."""
    ek_public, ak_public = vtpm.make_keys()
    credential = credential_for(ek_public, ak_public, bytes(32))

    def refuse(*_: object, **__: object) -> None:
        raise TSS2_Exception(0x101)

    monkeypatch.setattr(vtpm._esapi, command, refuse)
    with pytest.raises(HardwareError) as caught:  # noqa: PT012 - the one that fails is the parameter's
        vtpm.activate(*credential)
        vtpm.make_keys()
    assert caught.value.code == "tpm.failure-mode"
    vtpm.close()
    assert handles(swtpm) == []


def test_the_second_key_failing_leaves_the_first_to_be_flushed(
    vtpm: Vtpm, swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EK without AK is flushed like both, and cannot be used."""
    create = vtpm._create_primary

    def only_ek(template: Tss, command: str) -> tuple[Tss, bytes]:
        if "AK" in command:
            raise HardwareError("no AK today")
        return create(template, command)

    monkeypatch.setattr(vtpm, "_create_primary", only_ek)
    with pytest.raises(HardwareError):
        vtpm.make_keys()
    with pytest.raises(UsageError) as caught:
        vtpm.quote(QUALIFYING, ALL)
    assert caught.value.code == "tpm.no-keys"
    vtpm.close()
    assert handles(swtpm) == []


def test_an_exception_in_the_callers_block_flushes_the_keys(swtpm: SimulatedVtpm) -> None:
    """Leaving the TPM flushes, whatever the reason for leaving."""

    def leave() -> None:
        with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
            opened.make_keys()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert handles(swtpm) == []


def test_many_attempts_in_one_connection_do_not_fill_the_tpm(vtpm: Vtpm) -> None:
    """Each attempt flushes the keys of the one before."""
    for _ in range(6):
        ek_public, ak_public = vtpm.make_keys()
        vtpm.activate(*credential_for(ek_public, ak_public, bytes(32)))


def test_closing_twice_is_fine(vtpm: Vtpm) -> None:
    """Cleaning up never needs to know whether somebody did."""
    vtpm.close()
    vtpm.close()


class CountingTcti(PyTCTI):  # type: ignore[misc]  # tpm2-pytss carries no annotations
    """Passes everything on to another TCTI and notes the sizes both ways, in bytes."""

    def __init__(self, inner: TCTILdr, sizes: list[int]) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = sizes

    def do_transmit(self, command: bytes) -> None:
        self.sizes.append(len(command))
        self.inner.transmit(command)

    def do_receive(self, timeout: int) -> bytes:
        answer = bytes(self.inner.receive(timeout=timeout))
        self.sizes.append(len(answer))
        return answer


def test_every_command_and_answer_fits_the_svsms_page(
    swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's tpm_svsm passes at most one page, its header included, each way."""
    sizes: list[int] = []
    with TCTILdr("swtpm", f"path={swtpm.socket_path}") as inner:
        counting = CountingTcti(inner, sizes)
        monkeypatch.setattr(vtpm_module, "ESAPI", lambda _: ESAPI(counting))
        with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
            ek_public, ak_public = opened.make_keys()
            opened.quote(QUALIFYING, ALL)
            opened.activate(*credential_for(ek_public, ak_public, bytes(32)))
            opened.random(RANDOM_LIMIT)
            opened.measure(15, CAP_DATA)
            opened.active_banks(15)
    assert len(sizes) > 20
    assert max(sizes) < SVSM_PAGE // 4


@pytest.mark.parametrize("count", [1, 32, 33, 64, 100, RANDOM_LIMIT])
def test_random_bytes_come_in_the_number_asked_for(vtpm: Vtpm, count: int) -> None:
    """A TPM gives as many at once as its largest hash is long; the rest is asked for again."""
    first, second = vtpm.random(count), vtpm.random(count)
    assert len(first) == len(second) == count
    assert count < 8 or first != second


@pytest.mark.parametrize("count", [-1, 0, RANDOM_LIMIT + 1])
def test_random_bytes_without_bound_are_refused(vtpm: Vtpm, count: int) -> None:
    """Neither none nor endlessly many."""
    with pytest.raises(UsageError):
        vtpm.random(count)


@pytest.mark.parametrize("given", [b"", bytes(33)])
def test_a_tpm_that_gives_another_number_of_random_bytes_is_an_error(
    vtpm: Vtpm, monkeypatch: pytest.MonkeyPatch, given: bytes
) -> None:
    """An empty answer must not be asked for again without end."""
    monkeypatch.setattr(vtpm._esapi, "get_random", lambda _: given)
    with pytest.raises(HardwareError) as caught:
        vtpm.random(32)
    assert caught.value.code == "tpm.random"


@pytest.mark.parametrize("pcr", [-1, 24, 1000])
def test_a_pcr_that_does_not_exist_is_refused(vtpm: Vtpm, pcr: int) -> None:
    """A wrong index is the caller's mistake, and never reaches another handle of the TPM."""
    for use in (
        lambda: vtpm.extend(pcr, bytes(32)),
        lambda: vtpm.measure(pcr, b""),
        lambda: vtpm.read_pcrs([pcr]),
        lambda: vtpm.active_banks(pcr),
    ):
        with pytest.raises(UsageError):
            use()


def test_a_digest_of_another_bank_is_refused(vtpm: Vtpm) -> None:
    """A digest is never padded or cut to the bank's size."""
    with pytest.raises(UsageError):
        vtpm.extend(15, bytes(20))


def test_the_event_log_is_the_one_beside_the_tcti(vtpm: Vtpm) -> None:
    """In tests the log's path is given with the TCTI."""
    assert vtpm.event_log() == b"a log"


def test_a_tpm_that_goes_away_is_a_named_error(tmp_path: Path) -> None:
    """The connection breaks, and closing afterwards breaks nothing more."""
    with SimulatedVtpm.start(tmp_path) as started:
        opened = open_vtpm(tcti=started.tcti, event_log=tmp_path)
        opened.make_keys()
    with pytest.raises(HardwareError) as caught:
        opened.quote(QUALIFYING, ALL)
    assert caught.value.code == "tpm.connection"
    opened.close()
