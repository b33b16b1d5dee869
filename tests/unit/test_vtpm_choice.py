"""Which TPM is taken, on a copy of sysfs made of directories and links; no TPM is opened here."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from kagimori_agent.cap import cap
from kagimori_agent.devices.tpm_errors import explain
from kagimori_agent.devices.tpm_places import (
    EVENT_LOG_LIMIT,
    NO_DRIVER,
    Place,
    by_driver,
    present,
    read_event_log,
)
from kagimori_agent.devices.vtpm import Vtpm, open_vtpm
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError


def plug(root: Path, name: str, driver: str | None, nodes: tuple[str, ...] = ("tpmrm", "tpm")) -> Path:
    """Give the machine below ``root`` a TPM as Linux shows it, and return its event log's path."""
    device = root / f"sys/devices/platform/{driver}.{name}"
    device.mkdir(parents=True)
    if driver is not None:
        bound = root / f"sys/bus/platform/drivers/{driver}"
        bound.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(bound)
    chip = root / "sys/class/tpm" / name
    chip.mkdir(parents=True)
    (chip / "device").symlink_to(device)
    (root / "dev").mkdir(exist_ok=True)
    for node in nodes:
        (root / "dev" / f"{node}{name.removeprefix('tpm')}").touch()
    log = root / f"sys/kernel/security/{name}/binary_bios_measurements"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"log of " + name.encode())
    return log


@pytest.mark.parametrize("bound", ["tpm-svsm", "tpm_svsm"])
@pytest.mark.parametrize("asked", ["tpm-svsm", "tpm_svsm"])
def test_a_driver_and_its_module_are_one_name(tmp_path: Path, bound: str, asked: str) -> None:
    """Linux calls the platform driver tpm-svsm and its module tpm_svsm."""
    log = plug(tmp_path, "tpm0", bound)
    place = by_driver(asked, tmp_path)
    assert place == Place("tpm0", "tpm_svsm", f"device:{tmp_path}/dev/tpmrm0", log)


def test_the_index_does_not_matter(tmp_path: Path) -> None:
    """A host that gives the VM more TPMs, found earlier or later, does not move the choice."""
    plug(tmp_path, "tpm0", "tpm_crb")
    log = plug(tmp_path, "tpm1", "tpm-svsm")
    plug(tmp_path, "tpm10", "tpm_tis")
    place = by_driver(root=tmp_path)
    assert (place.name, place.event_log) == ("tpm1", log)
    assert [found.name for found in present(tmp_path)] == ["tpm0", "tpm1", "tpm10"]


def test_two_tpms_of_the_driver_refuse(tmp_path: Path) -> None:
    """Choosing one of them would be guessing, and the host would have made the guess possible."""
    plug(tmp_path, "tpm0", "tpm-svsm")
    plug(tmp_path, "tpm1", "tpm-svsm")
    with pytest.raises(HardwareError) as caught:
        by_driver(root=tmp_path)
    assert caught.value.code == "tpm.ambiguous"
    assert caught.value.found == "tpm0 by tpm_svsm, tpm1 by tpm_svsm"


def test_no_tpm_of_the_driver_refuses_and_lists_what_is_there(tmp_path: Path) -> None:
    """A TPM of the host's is never taken in place of the SVSM's."""
    plug(tmp_path, "tpm0", "tpm_crb")
    plug(tmp_path, "tpm1", None)
    with pytest.raises(ImageError) as caught:
        open_vtpm(root=tmp_path)
    assert caught.value.code == "tpm.no-driver"
    assert caught.value.found == f"tpm0 by tpm_crb, tpm1 by {NO_DRIVER}"


@pytest.mark.parametrize("driver", ["", NO_DRIVER, "tpm", "svsm", "tpm_svsm2"])
def test_only_the_whole_name_of_a_driver_counts(tmp_path: Path, driver: str) -> None:
    """No name means no TPM, and a part of a name is another name."""
    plug(tmp_path, "tpm0", "tpm-svsm")
    with pytest.raises(ImageError):
        by_driver(driver, tmp_path)


def test_a_kernel_without_tpms_says_so(tmp_path: Path) -> None:
    """Neither a missing class directory nor an empty one is a traceback."""
    for path in (tmp_path / "sys", tmp_path / "sys/class/tpm"):
        path.mkdir(parents=True)
        with pytest.raises(ImageError, match="tpm_svsm") as caught:
            by_driver(root=tmp_path)
        assert caught.value.found == "no TPM at all"


def test_other_entries_of_the_class_are_no_tpms(tmp_path: Path) -> None:
    """Only tpm and a number is a TPM."""
    plug(tmp_path, "tpm0", "tpm-svsm")
    for name in ("tpmrm0", "tpm", "tpm0x", "readme"):
        (tmp_path / "sys/class/tpm" / name).mkdir()
    assert [place.name for place in present(tmp_path)] == ["tpm0"]


@pytest.mark.parametrize(
    ("nodes", "tcti"), [(("tpmrm", "tpm"), "tpmrm0"), (("tpmrm",), "tpmrm0"), (("tpm",), "tpm0")]
)
def test_the_resource_manager_is_preferred(tmp_path: Path, nodes: tuple[str, ...], tcti: str) -> None:
    """It is shared, and flushes what a dead program left; the bare device serves where it is missing."""
    plug(tmp_path, "tpm0", "tpm-svsm", nodes)
    assert by_driver(root=tmp_path).require_tcti() == f"device:{tmp_path}/dev/{tcti}"


def test_a_tpm_without_a_device_node_is_the_images_matter(tmp_path: Path) -> None:
    """An initramfs without devtmpfs has the TPM and no way to it."""
    plug(tmp_path, "tpm0", "tpm-svsm", ())
    with pytest.raises(ImageError) as caught:
        Vtpm(by_driver(root=tmp_path))
    assert caught.value.code == "tpm.no-node"


def test_a_device_that_is_no_tpm_is_a_named_error(tmp_path: Path) -> None:
    """What the TSS says is passed on, with its layer and what to do."""
    plug(tmp_path, "tpm0", "tpm-svsm", ("tpm",))
    (tmp_path / "dev/tpm0").unlink()
    (tmp_path / "dev/tpm0").mkdir()
    with pytest.raises(HardwareError) as caught:
        open_vtpm(root=tmp_path)
    assert caught.value.code == "tpm.connection"
    assert "TCTI" in str(caught.value.found)


def test_a_tcti_without_an_event_log_is_refused() -> None:
    """Only a TPM that was found by its driver has a log in a known place."""
    with pytest.raises(UsageError) as caught:
        open_vtpm(tcti="swtpm:path=/nowhere")
    assert caught.value.code == "tpm.event-log"


@pytest.mark.parametrize("tcti", ["nonsense:x", "swtpm:path=/nowhere", "device:/nowhere", ""])
def test_a_tcti_that_leads_nowhere_is_a_named_error(tmp_path: Path, tcti: str) -> None:
    """No connection is never a traceback."""
    with pytest.raises(KagimoriError) as caught:
        open_vtpm(tcti=tcti, event_log=tmp_path)
    assert caught.value.code in {"tpm.connection", "tpm.no-tcti"}


def test_an_event_log_is_read_to_its_end(tmp_path: Path) -> None:
    """The kernel gives its size as zero, so only reading tells."""
    log = plug(tmp_path, "tpm0", "tpm-svsm")
    log.write_bytes(bytes(EVENT_LOG_LIMIT))
    assert read_event_log(log, tmp_path) == bytes(EVENT_LOG_LIMIT)


@pytest.mark.parametrize(
    ("contents", "code"),
    [(None, "eventlog.absent"), (b"", "eventlog.empty"), (bytes(EVENT_LOG_LIMIT + 1), "eventlog.too-big")],
    ids=["absent", "empty", "too large"],
)
def test_an_event_log_that_explains_nothing_is_refused(
    tmp_path: Path, contents: bytes | None, code: str
) -> None:
    """Absent, empty and endless logs have names of their own."""
    log = plug(tmp_path, "tpm0", "tpm-svsm")
    if contents is None:
        log.unlink()
    else:
        log.write_bytes(contents)
    with pytest.raises(HardwareError) as caught:
        read_event_log(log, tmp_path)
    assert caught.value.code == code


@pytest.mark.parametrize("empty", [True, False])
def test_securityfs_that_is_not_mounted_is_told_from_a_missing_log(tmp_path: Path, *, empty: bool) -> None:
    """An image that does not mount it is not firmware that does not measure."""
    if empty:
        (tmp_path / "sys/kernel/security").mkdir(parents=True)
    with pytest.raises(ImageError) as caught:
        read_event_log(tmp_path / "sys/kernel/security/tpm0/binary_bios_measurements", tmp_path)
    assert caught.value.code == "eventlog.no-securityfs"
    assert str(caught.value.todo).startswith("mount -t securityfs")


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, UsageError), (errno.EIO, HardwareError)])
def test_an_event_log_that_cannot_be_read_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[KagimoriError]
) -> None:
    """Rights are the caller's matter, everything else the machine's."""

    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(kind):
        read_event_log(tmp_path / "log")


def test_a_directory_in_place_of_an_event_log_is_a_named_error(tmp_path: Path) -> None:
    """Nothing that lies at the path is a traceback."""
    with pytest.raises(HardwareError) as caught:
        read_event_log(tmp_path, tmp_path)
    assert caught.value.code == "eventlog.unreadable"


@pytest.mark.parametrize(
    ("rc", "code", "layer"),
    [
        (0x00000100, "tpm.not-started", "TPM"),
        (0x00000101, "tpm.failure-mode", "TPM"),
        (0x00000902, "tpm.full", "TPM"),
        (0x00000903, "tpm.full", "TPM"),
        (0x00000921, "tpm.lockout", "TPM"),
        (0x0000012F, "tpm.no-authorisation", "TPM"),
        (0x000001DF, "tpm.credential", "TPM"),
        (0x000009A2, "tpm.password", "TPM"),
        (0x0000098E, "tpm.password", "TPM"),
        (0x00000185, "tpm.hierarchy", "TPM"),
        (0x000002A6, "tpm.curve", "TPM"),
        (0x000002C4, "tpm.value", "TPM"),
        (0x000C0902, "tpm.full", "resource manager's TPM"),
        (0x000B0143, "tpm.command", "resource manager"),
        (0x000A000A, "tpm.connection", "TCTI"),
        (0x0007000B, "tpm.rc", "ESAPI"),
        (0x00FF0001, "tpm.rc", "layer 255"),
    ],
)
def test_each_return_code_names_its_layer_and_what_to_do(rc: int, code: str, layer: str) -> None:
    """The number of a handle, parameter or session does not change what a code means."""
    error = explain(rc, "the TSS's words", "TPM2_Quote", "tpm0")
    assert isinstance(error, HardwareError)
    assert error.code == code
    assert error.found == f"0x{rc:08x} from the {layer}: the TSS's words"
    assert error.todo


def test_a_missing_tcti_library_is_the_images_matter() -> None:
    """An initramfs without libtss2-tcti-device has a TPM that nothing can speak to."""
    error = explain(0x000A0015, "not supported", "opening the TPM", "tpm0")
    assert isinstance(error, ImageError)
    assert error.code == "tpm.no-tcti"


def test_a_cap_without_the_expected_tpm_fails(tmp_path: Path) -> None:
    """A TPM whose driver loads after the cap would come up with the cap PCR still zero."""
    with pytest.raises(ImageError) as caught:
        cap(root=tmp_path)
    assert caught.value.code == "tpm.no-driver"
    assert cap(driver=None, root=tmp_path) == []


def test_a_cap_goes_on_after_a_tpm_that_fails_and_fails_in_the_end(tmp_path: Path) -> None:
    """All that cannot be capped are named, none is skipped."""
    plug(tmp_path, "tpm0", "tpm_crb", ())
    plug(tmp_path, "tpm1", "tpm-svsm", ("tpm",))
    with pytest.raises(HardwareError) as caught:
        cap(root=tmp_path)
    assert caught.value.code == "cap.failed"
    assert "tpm0" in str(caught.value.found)
    assert "tpm1" in str(caught.value.found)


@pytest.mark.parametrize("pcr", [-1, 16, 23, 24])
def test_a_pcr_that_can_be_reset_holds_no_cap(pcr: int) -> None:
    """PCRs 16 and 23 can be reset by anyone, and 17 to 22 do not start at zero."""
    with pytest.raises(UsageError) as caught:
        cap(pcr, driver=None)
    assert caught.value.code == "cap.pcr"


@pytest.mark.parametrize(
    "module",
    [
        "cap",
        "devices",
        "devices.configfs_tsm",
        "devices.doors",
        "devices.report",
        "devices.sev_guest",
        "devices.tpm_places",
    ],
)
def test_doors_that_are_not_opened_cost_nothing(module: str) -> None:
    """The import budgets of the docstrings hold: no TPM library, no cryptography, no msgspec, no network."""
    code = (
        f"import sys, kagimori_agent.{module}\n"
        "print([name for name in ('tpm2_pytss', 'cryptography', 'msgspec', 'requests', 'socket', 'ssl')"
        " if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
