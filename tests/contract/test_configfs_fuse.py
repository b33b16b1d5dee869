"""The simulated configfs-tsm against the kernel's contract, by plain system calls (FORMATS section 3)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_simulator import faults
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.configfs import ConfigfsTsm
from kagimori_simulator.machine import PADDED_TABLE_SIZE, SnpMachine
from kagimori_simulator.svsm import VTPM_SERVICE, Svsm
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INBLOB = bytes(range(64))
PLAIN = {"generation", "provider", "privlevel", "privlevel_floor", "inblob", "outblob", "auxblob"}
SERVICE = {"service_provider", "service_guid", "service_manifest_version", "manifestblob"}


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def plain(root: AmdRoot, tmp_path: Path) -> Iterator[tuple[ConfigfsTsm, Path]]:
    """Mount the door of a guest without an SVSM, and make one item."""
    tsm = ConfigfsTsm(SnpMachine(root))
    with tsm.mounted(tmp_path / "tsm") as directory:
        (directory / "report" / "x").mkdir()
        yield tsm, directory / "report" / "x"


@pytest.fixture
def under_svsm(root: AmdRoot, tmp_path: Path) -> Iterator[tuple[ConfigfsTsm, Path]]:
    """Mount the door of a guest under an SVSM, and make one item."""
    machine = SnpMachine(root, svsm=True)
    with Vtpm.start(tmp_path / "tpm") as vtpm:
        tsm = ConfigfsTsm(machine, Svsm(machine, vtpm))
        with tsm.mounted(tmp_path / "tsm") as directory:
            (directory / "report" / "x").mkdir()
            yield tsm, directory / "report" / "x"


def write(path: Path, data: bytes) -> None:
    """Open for writing, write once, close."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        assert os.write(descriptor, data) == len(data)
    finally:
        os.close(descriptor)


def read(path: Path) -> bytes:
    """Read to the end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 65536), b""))
    finally:
        os.close(descriptor)


def generation(item: Path) -> int:
    """Read the counter of successful writes."""
    text = read(item / "generation")
    assert text.endswith(b"\n")
    return int(text)


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """Expect exactly this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is checked below
        yield
    assert caught.value.errno == number, errno.errorcode.get(caught.value.errno or 0)


def test_a_plain_guest_sees_no_service_attributes(plain: tuple[ConfigfsTsm, Path]) -> None:
    """They are visible under an SVSM only."""
    _, item = plain
    assert set(os.listdir(item)) == PLAIN  # noqa: PTH208 - plain system calls
    for name in SERVICE:
        with refused(errno.ENOENT):
            (item / name).stat()


def test_a_guest_under_an_svsm_sees_all_attributes(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """With the kernel's modes."""
    _, item = under_svsm
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in item.iterdir()}
    assert set(modes) == PLAIN | SERVICE
    writable = {"privlevel", "inblob", "service_provider", "service_guid", "service_manifest_version"}
    assert modes == {name: 0o200 if name in writable else 0o444 for name in modes}


def test_a_plain_report_commits_to_the_inblob(plain: tuple[ConfigfsTsm, Path]) -> None:
    """Write 64 bytes, close, and read 1184 bytes and the host's certificates."""
    tsm, item = plain
    write(item / "inblob", INBLOB)
    report = Report.parse(read(item / "outblob"))
    assert (report.report_data, report.vmpl) == (INBLOB, 0)
    assert read(item / "auxblob") == tsm.machine.certificate_table()
    assert read(item / "provider") == b"sev_guest\n"
    assert read(item / "privlevel_floor") == b"0\n"


def test_a_plain_report_cuts_the_hosts_padding(plain: tuple[ConfigfsTsm, Path]) -> None:
    """Linux trims a plain report's table to where its entries end."""
    tsm, item = plain
    tsm.machine.pad_certificates = True
    write(item / "inblob", INBLOB)
    assert 0 < len(read(item / "auxblob")) < PADDED_TABLE_SIZE


def test_a_service_report_carries_the_manifest(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """The SVSM's report has VMPL 0 although the guest never could."""
    tsm, item = under_svsm
    assert tsm.svsm is not None
    write(item / "service_provider", b"svsm\n")
    write(item / "service_guid", str(VTPM_SERVICE).encode())
    write(item / "service_manifest_version", b"0")
    write(item / "inblob", INBLOB)
    assert generation(item) == 4
    report = Report.parse(read(item / "outblob"))
    manifest = read(item / "manifestblob")
    assert manifest == tsm.svsm.manifest
    assert (report.report_data, report.vmpl) == (hashlib.sha512(INBLOB + manifest).digest(), 0)
    assert read(item / "auxblob") == tsm.machine.certificate_table()


def test_without_a_service_guid_all_services_are_attested(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """The kernel then makes the other call, and the manifest is a list."""
    _, item = under_svsm
    write(item / "service_provider", b"svsm")
    write(item / "inblob", INBLOB)
    assert len(read(item / "manifestblob")) == 48 + 314


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("service_provider", b"tdx"),
        ("service_guid", b"a4453a59-9e1b-4787-a033-1986d6adbe55"),
        ("service_manifest_version", b"1"),
    ],
)
def test_a_service_that_is_not_there_is_einval(
    under_svsm: tuple[ConfigfsTsm, Path], attribute: str, value: bytes
) -> None:
    """The write is taken, the SVSM refuses, and reading says EINVAL."""
    _, item = under_svsm
    options = {"service_provider": b"svsm", "service_guid": str(VTPM_SERVICE).encode(), attribute: value}
    for name, text in options.items():
        write(item / name, text)
    write(item / "inblob", INBLOB)
    for name in ("outblob", "auxblob", "manifestblob"):
        with refused(errno.EINVAL):
            read(item / name)


def test_under_an_svsm_the_default_privlevel_is_too_low(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """A plain report needs privlevel at or above the floor, which is the guest's own VMPL."""
    _, item = under_svsm
    write(item / "inblob", INBLOB)
    with refused(errno.EINVAL):
        read(item / "outblob")
    assert read(item / "privlevel_floor") == b"2\n"
    write(item / "privlevel", b"2")
    assert Report.parse(read(item / "outblob")).vmpl == 2
    write(item / "privlevel", b"0x3\n")
    assert Report.parse(read(item / "outblob")).vmpl == 3


@pytest.mark.parametrize("value", [b"0", b"1", b"4", b"-1", b"", b"2 ", b"two", b"2\n\n", b"08", b"0x"])
def test_a_privlevel_below_the_floor_or_no_number_is_einval(
    under_svsm: tuple[ConfigfsTsm, Path], value: bytes
) -> None:
    """And nothing is counted; a write of no bytes is no write at all."""
    _, item = under_svsm
    if value:
        with refused(errno.EINVAL):
            write(item / "privlevel", value)
    else:
        write(item / "privlevel", value)
    assert generation(item) == 0


def test_a_number_beyond_32_bits_is_erange(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """As kstrtouint says."""
    _, item = under_svsm
    with refused(errno.ERANGE):
        write(item / "service_manifest_version", b"4294967296")
    write(item / "service_manifest_version", b"4294967295\n")


@pytest.mark.parametrize("value", [b"no guid", b"c476f1eb-0123-45a5-9641-b4e7dde5bfe", b"\xff" * 36])
def test_a_bad_guid_is_einval(under_svsm: tuple[ConfigfsTsm, Path], value: bytes) -> None:
    """At the write already."""
    _, item = under_svsm
    with refused(errno.EINVAL):
        write(item / "service_guid", value)


@pytest.mark.parametrize("name", ["outblob", "auxblob"])
def test_a_blob_before_the_inblob_is_einval(plain: tuple[ConfigfsTsm, Path], name: str) -> None:
    """There is nothing to sign yet."""
    _, item = plain
    with refused(errno.EINVAL):
        read(item / name)


@pytest.mark.parametrize("size", [1, 32, 63])
def test_a_short_inblob_fails_when_the_report_is_read(plain: tuple[ConfigfsTsm, Path], size: int) -> None:
    """The write itself is counted; SEV wants exactly 64 bytes."""
    _, item = plain
    write(item / "inblob", bytes(size))
    assert generation(item) == 1
    with refused(errno.EINVAL):
        read(item / "outblob")


def test_a_long_inblob_is_efbig(plain: tuple[ConfigfsTsm, Path]) -> None:
    """And is not taken."""
    _, item = plain
    with refused(errno.EFBIG):
        write(item / "inblob", bytes(65))
    assert generation(item) == 0


def test_the_inblob_is_taken_at_close(plain: tuple[ConfigfsTsm, Path]) -> None:
    """Not at write; closing has taken it when it returns."""
    _, item = plain
    descriptor = os.open(item / "inblob", os.O_WRONLY)
    os.write(descriptor, INBLOB)
    assert generation(item) == 0
    os.close(descriptor)
    assert generation(item) == 1


def test_the_inblob_is_taken_at_the_last_close(plain: tuple[ConfigfsTsm, Path]) -> None:
    """A copy of the descriptor, as another process may hold, keeps it back."""
    _, item = plain
    descriptor = os.open(item / "inblob", os.O_WRONLY)
    copy = os.dup(descriptor)
    os.write(descriptor, INBLOB)
    os.close(descriptor)
    assert generation(item) == 0
    os.close(copy)
    assert generation(item) == 1


def test_two_opens_make_two_inblobs(plain: tuple[ConfigfsTsm, Path]) -> None:
    """Which is why 64 bytes go into one open file: the last one counts alone."""
    _, item = plain
    write(item / "inblob", INBLOB[:32])
    write(item / "inblob", INBLOB[32:])
    assert generation(item) == 2
    with refused(errno.EINVAL):
        read(item / "outblob")


def test_a_write_that_would_wrap_the_counter_is_ebusy(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """For text at the write; for the inblob the kernel loses the error, and only the counter shows it."""
    tsm, item = under_svsm
    tsm.items["x"].write_generation = 4
    tsm.items["x"].read_generation = 5
    with refused(errno.EBUSY):
        write(item / "privlevel", b"2")
    write(item / "inblob", INBLOB)
    assert generation(item) == 4


def test_each_successful_write_counts_and_reading_does_not(plain: tuple[ConfigfsTsm, Path]) -> None:
    """The report stays the same until something is written."""
    _, item = plain
    write(item / "inblob", INBLOB)
    first = read(item / "outblob")
    assert read(item / "outblob") == first
    assert generation(item) == 1
    write(item / "privlevel", b"1")
    assert generation(item) == 2
    assert read(item / "outblob") != first


def test_an_interfering_writer_shows_in_the_generation(plain: tuple[ConfigfsTsm, Path]) -> None:
    """What is read next then belongs to other data."""
    tsm, item = plain
    faults.stale_generation(tsm)
    write(item / "inblob", INBLOB)
    assert Report.parse(read(item / "outblob")).report_data == INBLOB
    assert generation(item) == 2


def test_a_vanished_provider_is_enxio(plain: tuple[ConfigfsTsm, Path]) -> None:
    """For blobs, for the provider's name and for new items."""
    tsm, item = plain
    write(item / "inblob", INBLOB)
    tsm.provider = None
    for name in ("outblob", "auxblob", "provider"):
        with refused(errno.ENXIO):
            read(item / name)
    with refused(errno.ENXIO):
        (item.parent / "y").mkdir()


def test_a_chosen_failure_comes_through(plain: tuple[ConfigfsTsm, Path]) -> None:
    """Such as what a throttling host does: ETIMEDOUT once, ENOTTY from then on."""
    tsm, item = plain
    write(item / "inblob", INBLOB)
    tsm.failures["outblob"] = errno.ETIMEDOUT
    with refused(errno.ETIMEDOUT):
        read(item / "outblob")
    tsm.failures["outblob"] = errno.ENOTTY
    with refused(errno.ENOTTY):
        read(item / "outblob")
    tsm.failures["privlevel"] = errno.EBUSY
    with refused(errno.EBUSY):
        write(item / "privlevel", b"0")


def test_a_blob_beyond_32_kib_is_efbig(under_svsm: tuple[ConfigfsTsm, Path]) -> None:
    """TSM_REPORT_OUTBLOB_MAX, seen from a host with a monstrous table: for an SVSM's answer the kernel's buffer grows."""
    tsm, item = under_svsm
    tsm.machine.certificates = {uuid.uuid4(): bytes(0x8000)}
    write(item / "service_provider", b"svsm")
    write(item / "service_guid", str(VTPM_SERVICE).encode())
    write(item / "inblob", INBLOB)
    with refused(errno.EFBIG):
        read(item / "auxblob")
    assert len(read(item / "outblob")) == REPORT_SIZE


def test_a_plain_report_with_more_than_16_kib_of_certificates_is_eio(plain: tuple[ConfigfsTsm, Path]) -> None:
    """The buffer of a plain report does not grow, and configfs-tsm knows no report without certificates."""
    tsm, item = plain
    tsm.machine.certificates = {uuid.uuid4(): bytes(0x4000)}
    write(item / "inblob", INBLOB)
    with refused(errno.EIO):
        read(item / "outblob")
    tsm.machine.certificates = None
    assert len(read(item / "outblob")) == REPORT_SIZE


@pytest.mark.parametrize("hidden", [False, True])
def test_without_certificates_the_auxblob_is_empty_or_absent(
    plain: tuple[ConfigfsTsm, Path], hidden: bool
) -> None:
    """Who reads it must live with both."""
    tsm, item = plain
    tsm.hide_empty_auxblob = hidden
    faults.no_certificates(tsm.machine)
    write(item / "inblob", INBLOB)
    assert len(read(item / "outblob")) == REPORT_SIZE
    if hidden:
        with refused(errno.ENOENT):
            read(item / "auxblob")
    else:
        assert read(item / "auxblob") == b""


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("inblob", os.O_RDONLY),
        ("privlevel", os.O_RDONLY),
        ("outblob", os.O_WRONLY),
        ("generation", os.O_WRONLY),
        ("provider", os.O_RDWR),
        ("inblob", os.O_RDWR),
    ],
)
def test_an_attribute_opens_in_its_own_direction_only(
    plain: tuple[ConfigfsTsm, Path], name: str, flags: int
) -> None:
    """Not even root reads what is write-only."""
    _, item = plain
    with refused(errno.EACCES):
        os.open(item / name, flags)


def test_items_come_and_go_by_mkdir_and_rmdir(plain: tuple[ConfigfsTsm, Path]) -> None:
    """With all that is in them, and each for itself."""
    _, item = plain
    report = item.parent
    (report / "y").mkdir()
    with refused(errno.EEXIST):
        (report / "y").mkdir()
    write(report / "y" / "inblob", INBLOB)
    assert (generation(report / "y"), generation(item)) == (1, 0)
    (report / "y").rmdir()
    with refused(errno.ENOENT):
        (report / "y").stat()
    with refused(errno.ENOENT):
        (report / "y").rmdir()


@pytest.mark.parametrize(
    ("act", "number"),
    [
        (lambda item: (item / "deeper").mkdir(), errno.EPERM),
        (lambda item: (item.parent.parent / "beside").mkdir(), errno.EPERM),
        (lambda item: item.parent.rmdir(), errno.EPERM),
        (lambda item: (item / "outblob").unlink(), errno.EPERM),
        (lambda item: os.open(item / "new", os.O_WRONLY | os.O_CREAT), errno.EACCES),
        (lambda item: (item.parent / "absent").stat(), errno.ENOENT),
        (lambda item: (item.parent.parent / "absent" / "x").stat(), errno.ENOENT),
        (lambda item: (item / "absent").stat(), errno.ENOENT),
    ],
)
def test_configfs_has_no_other_files(
    plain: tuple[ConfigfsTsm, Path], act: Callable[[Path], object], number: int
) -> None:
    """Nothing else can be made or removed."""
    _, item = plain
    with refused(number):
        act(item)


@given(data=st.lists(st.tuples(st.sampled_from(sorted(PLAIN)), st.binary(max_size=70)), max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_bytes_make_an_attribute_answer_oddly(
    plain: tuple[ConfigfsTsm, Path], data: list[tuple[str, bytes]]
) -> None:
    """Whatever is written where: an errno that the kernel has, or success; and the counter counts successes."""
    _, item = plain
    known = {errno.EINVAL, errno.ERANGE, errno.EFBIG, errno.EACCES}
    for name, value in data:
        before, failure = generation(item), 0
        try:
            write(item / name, value)
        except OSError as error:
            failure = error.errno or -1
        assert failure == 0 or failure in known
        assert generation(item) == before + bool(value and not failure)
