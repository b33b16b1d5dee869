"""The simulated vTPM and SVSM: a real swtpm that holds a measured boot, and who vouches for its EK."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_protocol.errors import HardwareError, ImageError, UsageError
from kagimori_protocol.snp import Report
from kagimori_protocol.tpm import require_ek_l1
from kagimori_simulator import vtpm as vtpm_module
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.faults import clone_vtpm
from kagimori_simulator.machine import PADDED_TABLE_SIZE, SnpMachine
from kagimori_simulator.measured_boot import Firmware, MeasuredBoot, direct, grub, uki
from kagimori_simulator.svsm import SERVICES_MANIFEST, VTPM_SERVICE, Svsm
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Iterator

NONCE = bytes(range(64))
LONGER_THAN_A_SOCKET_PATH = "a-very-long-name-" * 7


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def vtpm(tmp_path: Path) -> Iterator[Vtpm]:
    """Give a fresh TPM."""
    with Vtpm.start(tmp_path) as started:
        yield started


@pytest.fixture
def svsm(root: AmdRoot, vtpm: Vtpm) -> Svsm:
    """Give an SVSM over that TPM."""
    return Svsm(SnpMachine(root, svsm=True), vtpm)


@pytest.mark.parametrize(
    "boot",
    [grub(), grub(shim=None), uki(), uki(load_options="single"), direct()],
    ids=["grub", "grub without shim", "uki", "uki with load options", "direct"],
)
def test_a_played_boot_is_what_the_tpm_says_in_every_bank(vtpm: Vtpm, boot: MeasuredBoot) -> None:
    """The TPM's PCRs are those that the boot computes, and the log lies where securityfs has it."""
    log = vtpm.play(boot)
    banks = vtpm.banks()
    assert banks == ("sha1", "sha256", "sha384", "sha512")
    for bank in banks:
        assert [vtpm.pcr(pcr, bank) for pcr in range(16)] == [boot.pcr(pcr, bank) for pcr in range(16)]
    assert log == vtpm.directory / "tpm0" / "binary_bios_measurements"
    assert log.read_bytes() == boot.event_log(banks)


def test_a_startup_locality_shows_in_pcr_0(tmp_path: Path) -> None:
    """TPM2_Startup from locality 3 starts PCR 0 at 3, as the log says."""
    boot = direct(firmware=Firmware(startup_locality=3))
    with Vtpm.start(tmp_path, startup_locality=3) as vtpm:
        vtpm.play(boot)
        assert [vtpm.pcr(pcr) for pcr in range(8)] == [boot.pcr(pcr) for pcr in range(8)]


def test_a_boot_from_another_locality_is_refused(vtpm: Vtpm) -> None:
    """Its log could never replay."""
    with pytest.raises(UsageError, match="locality"):
        vtpm.play(direct(firmware=Firmware(startup_locality=3)))


def test_an_extend_moves_the_sha256_bank_only(vtpm: Vtpm) -> None:
    """By the rule of the TPM: the new value is the hash of old value and digest."""
    digest = hashlib.sha256(b"something").digest()
    vtpm.extend(15, digest)
    assert vtpm.pcr(15) == hashlib.sha256(bytes(32) + digest).digest()
    assert vtpm.pcr(15, "sha384") == bytes(48)


def test_each_start_has_an_ek_of_its_own(tmp_path: Path) -> None:
    """An ephemeral vTPM makes new seeds at every boot, so an EK cannot be pinned."""
    eks = set()
    for _ in range(2):
        with Vtpm.start(tmp_path) as vtpm:
            eks.add(require_ek_l1(vtpm.ek_public()))
    assert len(eks) == 2


def test_a_clone_has_the_same_ek_and_pcrs_of_its_own(tmp_path: Path) -> None:
    """Copied seeds give the same EK, while both run, and each TPM has its own PCRs."""
    with Vtpm.start(tmp_path / "a", state=tmp_path / "state") as first:
        clone_vtpm(tmp_path / "state", tmp_path / "copy")
        with Vtpm.start(tmp_path / "b", state=tmp_path / "copy") as clone:
            assert clone.ek_public() == first.ek_public()
            clone.extend(8, bytes(32))
            assert first.pcr(8) == bytes(32)


def test_the_ek_does_not_stay_loaded(vtpm: Vtpm) -> None:
    """A TPM has room for three objects; asking ten times must not fill it."""
    assert len({vtpm.ek_public() for _ in range(10)}) == 1


def test_a_long_directory_name_does_not_matter(tmp_path: Path) -> None:
    """A UNIX socket's path is limited to 107 bytes, a test's directory is not."""
    with Vtpm.start(tmp_path / LONGER_THAN_A_SOCKET_PATH) as vtpm:
        assert vtpm.pcr(0) == bytes(32)


def test_no_tpm_outlives_its_block(tmp_path: Path) -> None:
    """Also when the block ends by an exception."""
    started: list[Vtpm] = []
    with contextlib.suppress(ZeroDivisionError), Vtpm.start(tmp_path) as vtpm:
        started.append(vtpm)
        raise ZeroDivisionError
    assert started[0].process.poll() is not None
    assert not started[0].socket_path.exists()


def test_no_tpm_outlives_a_killed_process(tmp_path: Path) -> None:
    """The kernel kills swtpm when who started it is killed."""
    code = (
        "import sys, time, pathlib; from kagimori_simulator.vtpm import Vtpm\n"
        "with Vtpm.start(pathlib.Path(sys.argv[1])) as vtpm:\n"
        "    print(vtpm.process.pid, vtpm.socket_path, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        pid, socket_path = child.stdout.readline().decode().split()
        child.kill()
    try:
        assert _gone_within(int(pid), seconds=5)
    finally:
        shutil.rmtree(Path(socket_path).parent)


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead, and whoever inherited it has yet to notice
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


def test_a_missing_swtpm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="apt-get install swtpm"), Vtpm.start(tmp_path):
        pytest.fail("it cannot have started")


def test_an_swtpm_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the whole deadline."""
    monkeypatch.setattr(vtpm_module, "_spawn", lambda *_: subprocess.Popen(["false"]))
    with pytest.raises(HardwareError, match="did not come up"), Vtpm.start(tmp_path):
        pytest.fail("it cannot have started")


def test_an_svsm_vouches_for_the_ek_of_its_tpm(svsm: Svsm, vtpm: Vtpm) -> None:
    """The manifest is the EK's TPMT_PUBLIC; REPORT_DATA is SHA-512(nonce || manifest), at VMPL 0."""
    report, manifest, certificates = svsm.attest_single_service(NONCE, VTPM_SERVICE)
    parsed = Report.parse(report)
    assert manifest == vtpm.ek_public() == require_ek_l1(manifest)
    assert parsed.report_data == hashlib.sha512(NONCE + manifest).digest()
    assert parsed.vmpl == 0
    assert certificates == svsm.machine.certificate_table()


def test_an_svsm_can_attest_while_the_tpm_is_in_use(svsm: Svsm, vtpm: Vtpm) -> None:
    """The guest keeps the TPM open when it asks; the SVSM knows the EK by heart."""
    with vtpm.connection():
        assert len(svsm.attest_single_service(NONCE, VTPM_SERVICE)[1]) == 314


@pytest.mark.parametrize(
    ("nonce", "service", "version"),
    [
        (NONCE[:-1], VTPM_SERVICE, 0),
        (NONCE + b"\x00", VTPM_SERVICE, 0),
        (NONCE, uuid.UUID("a4453a59-9e1b-4787-a033-1986d6adbe55"), 0),
        (NONCE, uuid.UUID(int=0), 0),
        (NONCE, VTPM_SERVICE, 1),
    ],
    ids=["short nonce", "long nonce", "another service", "no service", "another manifest version"],
)
def test_an_svsm_refuses_what_coconut_refuses(
    svsm: Svsm, nonce: bytes, service: uuid.UUID, version: int
) -> None:
    """INVALID_PARAMETER, in its own error."""
    with pytest.raises(HardwareError) as caught:
        svsm.attest_single_service(nonce, service, version)
    assert caught.value.code == "simulator.svsm-invalid-parameter"


def test_the_list_of_services_is_attested_in_the_same_way(svsm: Svsm) -> None:
    """Nothing in REPORT_DATA tells the two calls apart; only the manifest's first bytes do."""
    report, manifest, _ = svsm.attest_services(NONCE)
    assert Report.parse(report).report_data == hashlib.sha512(NONCE + manifest).digest()
    assert manifest[:16] == SERVICES_MANIFEST.bytes_le
    assert int.from_bytes(manifest[16:20], "little") == len(manifest)
    assert int.from_bytes(manifest[20:24], "little") == 1
    assert manifest[24:40] == VTPM_SERVICE.bytes_le
    offset, length = (int.from_bytes(manifest[at : at + 4], "little") for at in (40, 44))
    assert manifest[offset : offset + length] == svsm.manifest
    with pytest.raises(HardwareError):
        svsm.attest_services(b"")


def test_an_svsm_hands_on_the_hosts_padding(root: AmdRoot, vtpm: Vtpm) -> None:
    """Current COCONUT returns 16 KiB whatever the certificates take."""
    svsm = Svsm(SnpMachine(root, svsm=True, pad_certificates=True), vtpm)
    assert len(svsm.attest_single_service(NONCE, VTPM_SERVICE)[2]) == PADDED_TABLE_SIZE
