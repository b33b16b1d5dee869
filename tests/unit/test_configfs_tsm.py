"""The report door's file work, on a fake file system that answers as Linux's configfs-tsm does.

The simulator's FUSE file system runs the same class against real system calls; here are the cases that need
a kernel to misbehave.
"""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent.devices import configfs_tsm, device_class, tsm_entry
from kagimori_agent.devices.configfs_tsm import MAX_ATTEMPTS, ROOT, ConfigfsTsm
from kagimori_agent.devices.report import KeyWiped
from kagimori_agent.devices.tsm_entry import BLOB_LIMIT, GenerationChanged
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyfakefs.fake_file import FakeFile
    from pyfakefs.fake_filesystem import FakeFilesystem

DATA = bytes(range(64))
CERTIFICATES = b"table" * 100
MANIFEST = bytes([9]) * 314
REPORT_DATA_AT = 0x50


def report_over(report_data: bytes) -> bytes:
    """Make 1184 bytes with this REPORT_DATA."""
    return (bytes([7]) * REPORT_DATA_AT + report_data).ljust(1184, bytes([7]))


REPORT = report_over(DATA)
SERVICE_REPORT = report_over(hashlib.sha512(DATA + MANIFEST).digest())
VTPM = uuid.UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3")
SERVICE = ("service_provider", "service_guid", "service_manifest_version", "manifestblob")


class Kernel:
    """A kernel's configfs-tsm: populates each new directory, counts writes, fills the blobs.

    ``failures`` maps "mkdir", "rmdir", "read NAME" or "write NAME" to an errno; ``on_read`` runs when an attribute
    is opened for reading; ``blobs`` are what a request yields (None: no such attribute).
    """

    def __init__(self, fs: FakeFilesystem, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fs = fs
        self.floor: int | None = 0
        self.svsm = False
        self.provider = b"sev_guest\n"
        self.blobs: dict[str, bytes | None] = {
            "outblob": REPORT,
            "auxblob": CERTIFICATES,
            "manifestblob": MANIFEST,
        }
        self.failures: dict[str, int] = {}
        self.on_read: dict[str, Callable[[Path], None]] = {}
        self.writes: list[tuple[str, bytes]] = []
        self.entries = 0
        self.counts = True
        self.takes: int | None = None
        self.report = Path(ROOT / "report")
        fs.create_dir(self.report)
        path_class = type(self.report)
        system: Any = vars(tsm_entry)["os"]  # pyfakefs's
        real_mkdir, real_open, real_write = path_class.mkdir, system.open, system.write

        def mkdir(path: Path) -> None:
            self._fail("mkdir")
            real_mkdir(path)
            self.entries += 1
            self._populate(path)

        def rmdir(path: Path) -> None:
            for name in os.listdir(path):  # noqa: PTH208 - pyfakefs, as plain as it gets
                (path / name).unlink()
            fs.rmdir(str(path))
            self._fail("rmdir")

        def opened(path: Path, flags: int) -> int:
            name = Path(path).name
            if flags & os.O_WRONLY:
                assert not flags & (os.O_TRUNC | os.O_CREAT), "attributes are neither cut nor made"
                self._fail(f"write {name}")
            else:
                self._fail(f"read {name}")
                if name in self.on_read:
                    self.on_read[name](Path(path).parent)
            return int(real_open(path, flags))

        def write(descriptor: int, data: bytes) -> int:
            return int(real_write(descriptor, data[: self.takes]))

        monkeypatch.setattr(path_class, "mkdir", mkdir)
        monkeypatch.setattr(path_class, "rmdir", rmdir)
        monkeypatch.setattr(system, "open", opened)
        monkeypatch.setattr(system, "write", write)

    def _fail(self, what: str) -> None:
        if what in self.failures:
            raise OSError(self.failures[what], os.strerror(self.failures[what]))

    def _populate(self, entry: Path) -> None:
        names: dict[str, bytes] = {"provider": self.provider, "generation": b"41\n"}
        names |= dict.fromkeys(("inblob", "privlevel"), b"")
        names |= {name: blob for name, blob in self.blobs.items() if blob is not None}
        if self.floor is not None:
            names["privlevel_floor"] = b"%d\n" % self.floor
        if self.svsm:
            names |= dict.fromkeys(SERVICE[:3], b"")
        else:
            names.pop("manifestblob", None)
        for name, contents in names.items():
            settable = name in ("inblob", "privlevel", *SERVICE[:3])
            effect = self._written if settable else None
            self.fs.create_file(entry / name, contents=contents, side_effect=effect)

    def _written(self, file: FakeFile) -> None:
        contents = file.byte_contents
        if not contents:
            return
        self.writes.append((str(file.name), contents))
        if self.counts:
            bump(Path(str(file.path)).parent)

    @property
    def left(self) -> list[str]:
        """Directories that were not removed."""
        return os.listdir(self.report)  # noqa: PTH208 - pyfakefs, as plain as it gets


def bump(entry: Path) -> None:
    """Count one write, as the kernel does."""
    generation = entry / "generation"
    generation.write_text(f"{int(generation.read_text()) + 1}\n")


@pytest.fixture
def kernel(fs: FakeFilesystem, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Give a kernel without an SVSM below it."""
    return Kernel(fs, monkeypatch)


@pytest.fixture
def svsm_kernel(kernel: Kernel) -> Kernel:
    """Give a kernel at VMPL 2 above an SVSM."""
    kernel.svsm, kernel.floor = True, 2
    kernel.blobs["outblob"] = SERVICE_REPORT
    return kernel


def tsm() -> ConfigfsTsm:
    """Make the door anew, with a path of the fake file system."""
    return ConfigfsTsm(Path(ROOT))


def test_a_plain_report_is_one_write_of_64_bytes_and_three_blobs(kernel: Kernel) -> None:
    """The request is made in a directory of its own, which is gone afterwards."""
    answer = tsm().plain_report(DATA)
    assert (answer.report, answer.certificates, answer.provider) == (REPORT, CERTIFICATES, "sev_guest")
    assert kernel.writes == [("privlevel", b"0"), ("inblob", DATA)]
    assert kernel.left == []


def test_under_an_svsm_a_plain_report_asks_for_the_guests_own_vmpl(svsm_kernel: Kernel) -> None:
    """The default 0 would fail there, so the floor is written."""
    svsm_kernel.blobs["outblob"] = REPORT
    tsm().plain_report(DATA)
    assert svsm_kernel.writes == [("privlevel", b"2"), ("inblob", DATA)]


def test_without_a_privlevel_floor_no_privlevel_is_written(kernel: Kernel) -> None:
    """A kernel that knows no floor is left with its default."""
    kernel.floor = None
    tsm().plain_report(DATA)
    assert kernel.writes == [("inblob", DATA)]


@pytest.mark.parametrize("certificates", [None, b""], ids=["no auxblob at all", "an empty auxblob"])
def test_a_host_without_certificates_gives_an_empty_table(kernel: Kernel, certificates: bytes | None) -> None:
    """Certificates are a convenience of the host; the report is complete without."""
    kernel.blobs["auxblob"] = certificates
    assert tsm().plain_report(DATA).certificates == b""


def test_a_service_report_names_service_and_version_before_the_nonce(svsm_kernel: Kernel) -> None:
    """The SVSM is asked for one service's manifest, and inblob comes last."""
    answer = tsm().service_report(DATA, VTPM)
    assert (answer.report, answer.manifest, answer.certificates) == (SERVICE_REPORT, MANIFEST, CERTIFICATES)
    assert svsm_kernel.writes == [
        ("service_provider", b"svsm"),
        ("service_guid", str(VTPM).encode()),
        ("service_manifest_version", b"0"),
        ("inblob", DATA),
    ]
    assert svsm_kernel.left == []


@pytest.mark.parametrize("size", [0, 32, 63, 65, 128])
def test_data_of_another_size_is_refused_before_anything_is_opened(kernel: Kernel, size: int) -> None:
    """What a report binds is never padded or cut."""
    for ask in (lambda: tsm().plain_report(bytes(size)), lambda: tsm().service_report(bytes(size), VTPM)):
        with pytest.raises(UsageError) as caught:
            ask()
        assert caught.value.code == "tsm.inblob-size"
    assert kernel.entries == 0


@pytest.mark.parametrize(("guid", "version"), [("vtpm", 0), ("", 0), (str(VTPM), -1), (str(VTPM), 2**32)])
def test_a_service_that_cannot_be_named_is_refused(svsm_kernel: Kernel, guid: str, version: int) -> None:
    """Text that is no GUID and versions beyond 32 bits never reach the kernel."""
    with pytest.raises(UsageError):
        tsm().service_report(DATA, guid, version)
    assert svsm_kernel.entries == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENXIO, "tsm.no-provider"),
        (errno.EINVAL, "tsm.invalid"),
        (errno.EBUSY, "tsm.busy"),
        (errno.EFBIG, "tsm.too-big"),
        (errno.EIO, "tsm.firmware"),
        (errno.EBADMSG, "tsm.key-wiped"),
        (errno.ETIMEDOUT, "tsm.throttled"),
        (errno.ENOTTY, "tsm.key-wiped"),
        (errno.EWOULDBLOCK, "tsm.not-ready"),
        (errno.ENOSPC, "tsm.busy"),
        (errno.ENOMEM, "tsm.memory"),
        (errno.EPROTO, "tsm.errno"),
    ],
)
@pytest.mark.parametrize(
    "where", ["mkdir", "read outblob", "read auxblob", "write inblob", "read generation"]
)
def test_each_errno_has_a_name_and_a_remedy_and_is_not_tried_again(
    kernel: Kernel, number: int, code: str, where: str
) -> None:
    """A failed request may have cost the VM its key to the firmware, so there is no second one."""
    kernel.failures[where] = number
    with pytest.raises(HardwareError) as caught:
        tsm().plain_report(DATA)
    error = caught.value
    assert error.code == code
    assert error.expected
    assert error.todo
    assert errno.errorcode[number] in str(error.found)
    assert kernel.entries == (0 if where == "mkdir" else 1)
    assert kernel.left == []


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.ETIMEDOUT, errno.EBADMSG])
def test_a_key_that_is_gone_is_an_error_of_its_own_kind(kernel: Kernel, number: int) -> None:
    """It is final: whoever waits or asks again waits for nothing."""
    kernel.failures["read outblob"] = number
    with pytest.raises(KeyWiped, match="Power the VM off"):
        tsm().plain_report(DATA)


def test_the_guests_own_vmpl_is_the_floor(svsm_kernel: Kernel) -> None:
    """Asked without a request: nothing is written, and nothing is left."""
    assert tsm().guest_vmpl() == 2
    svsm_kernel.floor = None
    assert tsm().guest_vmpl() == 0
    assert (svsm_kernel.writes, svsm_kernel.left) == ([], [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_without_the_rights_the_caller_is_told(kernel: Kernel, number: int) -> None:
    """Not the machine is broken, but who called."""
    kernel.failures["mkdir"] = number
    with pytest.raises(UsageError) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.rights"


def test_a_directory_that_cannot_be_removed_is_an_error(kernel: Kernel) -> None:
    """A leftover is never silent."""
    kernel.failures["rmdir"] = errno.EBUSY
    with pytest.raises(HardwareError, match="used by something else"):
        tsm().plain_report(DATA)


def test_a_failing_removal_does_not_hide_the_first_error(kernel: Kernel) -> None:
    """What went wrong first is what helps."""
    kernel.failures |= {"read outblob": errno.ETIMEDOUT, "rmdir": errno.EBUSY}
    with pytest.raises(HardwareError) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.throttled"


def test_a_kernel_without_configfs_is_told_from_one_without_tsm(fs: FakeFilesystem) -> None:
    """Each missing layer has its own remedy, from the outside in."""
    found = []
    for make in (
        lambda: None,
        lambda: fs.create_dir("/sys/kernel/config"),
        lambda: fs.add_mount_point("/sys/kernel/config", can_exist=True),
        lambda: fs.create_dir(ROOT),
    ):
        make()
        with pytest.raises(ImageError) as caught:
            tsm().plain_report(DATA)
        found.append((caught.value.code, caught.value.todo))
    assert [code for code, _ in found] == ["tsm.no-configfs", "tsm.not-mounted", "tsm.no-tsm", "tsm.no-tsm"]
    assert found[1][1] == "mount -t configfs configfs /sys/kernel/config"
    assert "CONFIG_TSM_REPORTS" in str(found[2][1])


@pytest.mark.parametrize("name", ["provider", "generation", "inblob", "outblob"])
def test_a_missing_attribute_is_named(kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older or other kernel is the image's matter, not the machine's."""
    populate = kernel._populate

    def without(entry: Path) -> None:
        populate(entry)
        (entry / name).unlink()

    monkeypatch.setattr(kernel, "_populate", without)
    with pytest.raises(ImageError, match=name) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.attribute-missing"
    assert kernel.left == []


@pytest.mark.parametrize(
    ("floor", "reason"), [(0, "no SVSM runs below"), (None, "no SVSM runs below"), (2, "older than 6.11")]
)
def test_without_service_attributes_kernel_and_svsm_are_told_apart(
    kernel: Kernel, floor: int | None, reason: str
) -> None:
    """The kernel hides the attributes without an SVSM, and did not have them before 6.11."""
    kernel.floor = floor
    with pytest.raises(ImageError, match=reason) as caught:
        tsm().service_report(DATA, VTPM)
    assert caught.value.code == "tsm.no-service-attributes"
    assert kernel.writes == []


@pytest.mark.parametrize("provider", [b"tdx_guest\n", b"arm_cca_guest\n", b"\n", b"\xff\n"])
def test_another_provider_is_refused(kernel: Kernel, provider: bytes) -> None:
    """1184 bytes from another technology are no SNP report."""
    kernel.provider = provider
    with pytest.raises(HardwareError):
        tsm().plain_report(DATA)
    assert kernel.writes == []


@pytest.mark.parametrize("size", [0, 1183, 1185, 4000, 8000])
def test_a_report_of_another_size_is_refused(svsm_kernel: Kernel, size: int) -> None:
    """A report has one size, and is never padded or cut to it."""
    svsm_kernel.blobs["outblob"] = bytes(size)
    with pytest.raises(HardwareError) as plain:
        tsm().plain_report(DATA)
    with pytest.raises(HardwareError) as service:
        tsm().service_report(DATA, VTPM)
    assert plain.value.code == service.value.code == "tsm.report-size"


@pytest.mark.parametrize("name", ["outblob", "auxblob", "manifestblob"])
def test_a_blob_without_end_is_not_read_to_its_end(svsm_kernel: Kernel, name: str) -> None:
    """Every read is bounded; what is larger is refused, not cut."""
    svsm_kernel.blobs[name] = bytes(BLOB_LIMIT + 1)
    with pytest.raises(HardwareError) as caught:
        tsm().service_report(DATA, VTPM)
    assert caught.value.code == "tsm.too-big"


@pytest.mark.parametrize("wrong", [DATA, bytes(64), hashlib.sha512(MANIFEST + DATA).digest()])
def test_a_service_report_over_anything_but_nonce_and_manifest_is_refused(
    svsm_kernel: Kernel, wrong: bytes
) -> None:
    """Then it is no answer of this SVSM to this request."""
    svsm_kernel.blobs["outblob"] = report_over(wrong)
    with pytest.raises(HardwareError) as caught:
        tsm().service_report(DATA, VTPM)
    assert caught.value.code == "report.other-data"
    assert svsm_kernel.entries == 1


def test_an_svsm_without_a_manifest_is_refused(svsm_kernel: Kernel) -> None:
    """COCONUT lists a service without manifest by an empty one, which speaks for no EK."""
    svsm_kernel.blobs["manifestblob"] = b""
    with pytest.raises(HardwareError) as caught:
        tsm().service_report(DATA, VTPM)
    assert caught.value.code == "tsm.manifest"


def test_a_kernel_that_takes_half_of_inblob_is_refused(kernel: Kernel) -> None:
    """The rest is not sent after it: 64 bytes go in one write or not at all."""
    kernel.takes = 32
    kernel.floor = None
    with pytest.raises(HardwareError) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.short-write"
    assert kernel.writes == [("inblob", DATA[:32])]


@pytest.mark.parametrize("name", ["outblob", "auxblob", "manifestblob"])
def test_a_write_by_somebody_else_between_the_blobs_is_noticed(svsm_kernel: Kernel, name: str) -> None:
    """Blobs of two requests are never returned together, and the request is made anew a few times only."""
    svsm_kernel.on_read[name] = bump
    with pytest.raises(GenerationChanged) as caught:
        tsm().service_report(DATA, VTPM)
    assert caught.value.code == "tsm.generation"
    assert svsm_kernel.entries == MAX_ATTEMPTS
    assert svsm_kernel.left == []


def test_one_disturbance_is_survived_in_a_fresh_directory(kernel: Kernel) -> None:
    """The second request is whole, so its answer counts."""

    def once(entry: Path) -> None:
        del kernel.on_read["auxblob"]
        bump(entry)

    kernel.on_read["auxblob"] = once
    assert tsm().plain_report(DATA).report == REPORT
    assert kernel.entries == 2
    assert kernel.left == []


def test_a_write_that_the_kernel_swallowed_is_noticed(kernel: Kernel) -> None:
    """A configfs blob is taken at close(), whose error may get lost; the generation tells."""
    kernel.counts = False
    with pytest.raises(GenerationChanged):
        tsm().plain_report(DATA)


@pytest.mark.parametrize("text", ["", "-1", "0x10", "1.5", "one", "9" * 30, "1\n2"])
def test_a_generation_that_is_no_number_is_refused(kernel: Kernel, text: str) -> None:
    """A count that cannot be compared must not pass."""

    def spoil(entry: Path) -> None:
        (entry / "generation").write_text(text)

    kernel.on_read["generation"] = spoil
    with pytest.raises(HardwareError) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.attribute"


def test_a_privlevel_floor_beyond_the_last_vmpl_is_refused(kernel: Kernel) -> None:
    """There are four VMPLs."""
    kernel.floor = 4
    with pytest.raises(HardwareError) as caught:
        tsm().plain_report(DATA)
    assert caught.value.code == "tsm.attribute"


@given(contents=st.binary(max_size=200))
def test_any_text_attribute_is_read_or_refused_by_name(
    contents: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No content of an attribute raises anything but a named error."""
    entry = tmp_path_factory.mktemp("entry")
    (entry / "generation").write_bytes(contents)
    try:
        tsm_entry.Entry(entry).start()
    except KagimoriError as error:
        assert error.code == "tsm.attribute"  # noqa: PT017 - both outcomes are right
    else:
        assert contents.strip().isdigit()


def test_every_request_has_a_name_of_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two agents never write into one directory."""
    names = set()
    populate = kernel._populate

    def noted(entry: Path) -> None:
        names.add(entry.name)
        populate(entry)

    monkeypatch.setattr(kernel, "_populate", noted)
    for _ in range(8):
        tsm().plain_report(DATA)
    assert len(names) == 8


def test_doors_are_found_by_name_and_only_by_name() -> None:
    """The table is the whole list."""
    assert device_class("configfs-tsm") is configfs_tsm.ConfigfsTsm
    with pytest.raises(UsageError):
        device_class("os:system")
