"""The daemon behind a real kernel's configfs-tsm, without that kernel: requests as the module makes them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import uuid
from pathlib import Path

import pytest

from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp import Report
from kagimori_simulator import faults, tsm_provider
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.configfs import ConfigfsTsm
from kagimori_simulator.machine import SnpMachine, certificate_extent
from kagimori_simulator.svsm import SERVICES_MANIFEST, VTPM_SERVICE, Svsm
from kagimori_simulator.tsm_provider import ANSWER, REQUEST, SERVICE, answer

MODULE = Path(__file__).parent.parent.parent / "simulator" / "kernel"
DATA = bytes(range(64))
EK = b"what stands for a TPMT_PUBLIC"
NULL_GUID = uuid.UUID(int=0)


class OtherTpm:
    """As much of a vTPM as an SVSM looks at."""

    def ek_public(self) -> bytes:
        """Give the EK."""
        return EK


@pytest.fixture
def tsm(cache: Path) -> ConfigfsTsm:
    """Give what lies below a guest under an SVSM."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd"), svsm=True)
    return ConfigfsTsm(machine, Svsm(machine, OtherTpm()))  # type: ignore[arg-type]  # as its docstring says


def request(
    provider: bytes | None = b"svsm",
    guid: uuid.UUID = VTPM_SERVICE,
    version: int = 0,
    privlevel: int = 0,
    data: bytes = DATA,
) -> bytes:
    """Lay out a request."""
    flags = 0 if provider is None else SERVICE
    return REQUEST.pack(7, flags, privlevel, version, len(data), data, guid.bytes_le, provider or b"")


def blobs(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Take an answer apart, which must be a success."""
    number, error, *sizes = ANSWER.unpack_from(raw)
    assert (number, error) == (7, 0)
    assert len(raw) == ANSWER.size + sum(sizes)
    rest = raw[ANSWER.size :]
    return rest[: sizes[0]], rest[sizes[0] : sizes[0] + sizes[1]], rest[sizes[0] + sizes[1] :]


def test_a_service_is_attested_by_the_svsm(tsm: ConfigfsTsm) -> None:
    """Report of VMPL 0 over nonce and manifest, the manifest, and the host's table."""
    outblob, auxblob, manifest = blobs(answer(tsm, request()))
    report = Report.parse(outblob)
    assert (report.vmpl, report.report_data) == (0, hashlib.sha512(DATA + EK).digest())
    assert manifest == EK
    assert auxblob == tsm.machine.certificate_table()


def test_without_a_guid_all_services_are_attested(tsm: ConfigfsTsm) -> None:
    """As when service_guid was never written."""
    _, _, manifest = blobs(answer(tsm, request(guid=NULL_GUID)))
    assert manifest.startswith(SERVICES_MANIFEST.bytes_le)


def test_a_plain_report_is_of_the_privlevel_that_was_written(tsm: ConfigfsTsm) -> None:
    """Through the guest's own driver, with the table cut to its entries, and without a manifest."""
    outblob, auxblob, manifest = blobs(answer(tsm, request(provider=None, privlevel=3)))
    assert (Report.parse(outblob).vmpl, Report.parse(outblob).report_data) == (3, DATA)
    table = tsm.machine.certificate_table()
    assert auxblob == table[: certificate_extent(table)]
    assert manifest == b""


@pytest.mark.parametrize(
    "refused",
    [
        request(provider=b"SVSM"),
        request(provider=b""),
        request(guid=uuid.UUID(int=1)),
        request(version=1),
        request(provider=None, privlevel=0),
        request(data=DATA[:63]),
        request(provider=None, privlevel=2, data=DATA[:63]),
    ],
    ids=["provider", "no name", "service", "manifest version", "privlevel", "nonce", "REPORT_DATA"],
)
def test_what_driver_and_svsm_refuse_is_einval(tsm: ConfigfsTsm, refused: bytes) -> None:
    """And no blobs."""
    assert answer(tsm, refused) == ANSWER.pack(7, errno.EINVAL, 0, 0, 0)


def test_a_fault_of_the_driver_keeps_its_errno(tsm: ConfigfsTsm) -> None:
    """A wiped key, a gone driver, and whatever a test wants the attribute to answer."""
    faults.wiped_key(tsm.driver)
    assert ANSWER.unpack(answer(tsm, request(provider=None, privlevel=2)))[1] == errno.ENOTTY
    tsm.failures["outblob"] = errno.EBADMSG
    assert ANSWER.unpack(answer(tsm, request()))[1] == errno.EBADMSG
    tsm.provider = None
    assert ANSWER.unpack(answer(tsm, request()))[1] == errno.ENXIO


def test_the_daemon_answers_one_after_another_and_goes_on_after_an_error(
    tsm: ConfigfsTsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its other end is gone."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(os, "open", lambda *_: theirs.detach())
    thread = threading.Thread(target=tsm_provider.serve, args=(tsm,), daemon=True)
    with ours:
        ours.settimeout(10)
        thread.start()
        for raw, error in ((request(version=9), errno.EINVAL), (request(), 0)):
            ours.sendall(raw)
            assert ANSWER.unpack_from(ours.recv(1 << 17))[:2] == (7, error)
    thread.join(10)
    assert not thread.is_alive()


def test_a_kernel_without_the_module_is_told_at_once(tsm: ConfigfsTsm, tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(HardwareError) as caught:
        tsm_provider.serve(tsm, tmp_path / "kagimori-tsm")
    assert caught.value.code == "simulator.tsm-provider"
    assert "insmod" in str(caught.value.todo)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_both_ends_of_the_device_mean_the_same_bytes(tmp_path: Path) -> None:
    """The module's structures, as a compiler lays them out, against the two of this end."""
    fields = [
        "number",
        "flags",
        "privlevel",
        "manifest_version",
        "inblob_size",
        "inblob",
        "service_guid",
        "service_provider",
    ]
    sizes = ["number", "error", "outblob_size", "auxblob_size", "manifestblob_size"]
    places = [f"__builtin_offsetof(struct kagimori_tsm_request, {field})" for field in fields]
    places += ["sizeof(struct kagimori_tsm_request)"]
    places += [f"__builtin_offsetof(struct kagimori_tsm_answer, {field})" for field in sizes]
    places += ["sizeof(struct kagimori_tsm_answer)", "KAGIMORI_TSM_SERVICE"]
    lines = "".join(f'printf("%zu\\n", (size_t)({place}));' for place in places)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stdio.h>\n#include "kagimori_tsm.h"\nint main(void) {{ {lines} return 0; }}\n'
    )
    program = tmp_path / "layout"
    subprocess.run(["cc", "-Wall", "-Werror", "-I", str(MODULE), "-o", str(program), str(source)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    expected = [0, 4, 8, 12, 16, 20, 84, 100, REQUEST.size, 0, 4, 8, 12, 16, ANSWER.size, SERVICE]
    assert list(map(int, printed)) == expected
