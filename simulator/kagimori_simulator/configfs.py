"""Linux's configfs-tsm over a simulated machine: what the kernel does with each attribute, errno by errno.

Source: Documentation/ABI/testing/configfs-tsm-report; drivers/virt/coco/guest/report.c and drivers/virt/coco/sev-guest;
fs/configfs/file.c for when a binary attribute is taken (at close, its errors lost). ``fuse_mount`` serves it as files.

OSError is raised on purpose here: an errno is what the kernel says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp import REPORT_DATA_SIZE
from kagimori_simulator import fuse_mount
from kagimori_simulator.machine import HIGHEST_VMPL, certificate_extent
from kagimori_simulator.sev_guest import SevGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_simulator.machine import SnpMachine
    from kagimori_simulator.svsm import Svsm

INBLOB_MAX: Final = 64
OUTBLOB_MAX: Final = 0x8000
"""TSM_REPORT_OUTBLOB_MAX of Linux 6.7 to 6.18; bigger blobs read as EFBIG."""

PROVIDER: Final = "sev_guest"
SERVICE_PROVIDER: Final = "svsm"

_UINT: Final = re.compile(r"\+?(0[xX][0-9a-fA-F]+|[0-9]+)\n?", re.ASCII)
_GUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_UINT_MAX: Final = 0xFFFFFFFF
_GENERATION_MODULUS: Final = 1 << 64
_NULL_GUID: Final = uuid.UUID(int=0)


class Attribute(NamedTuple):
    """A file of a report item: its mode, whether it is binary, whether only an SVSM's guest sees it."""

    mode: int
    binary: bool = False
    svsm_only: bool = False


ATTRIBUTES: Final[dict[str, Attribute]] = {
    "generation": Attribute(0o444),
    "provider": Attribute(0o444),
    "privlevel": Attribute(0o200),
    "privlevel_floor": Attribute(0o444),
    "service_provider": Attribute(0o200, svsm_only=True),
    "service_guid": Attribute(0o200, svsm_only=True),
    "service_manifest_version": Attribute(0o200, svsm_only=True),
    "inblob": Attribute(0o200, binary=True),
    "outblob": Attribute(0o444, binary=True),
    "auxblob": Attribute(0o444, binary=True),
    "manifestblob": Attribute(0o444, binary=True, svsm_only=True),
}


@dataclass
class ReportItem:
    """One directory below ``report``: the options written so far, and the blobs of the last request."""

    tsm: ConfigfsTsm
    inblob: bytes = b""
    privlevel: int = 0
    service_provider: str | None = None
    service_guid: uuid.UUID = _NULL_GUID
    service_manifest_version: int = 0
    write_generation: int = 0
    read_generation: int = 0
    blobs: dict[str, bytes] | None = None

    def names(self) -> list[str]:
        """Name the files that this guest sees."""
        under_svsm = self.tsm.svsm is not None
        hidden = {name for name, attribute in ATTRIBUTES.items() if attribute.svsm_only and not under_svsm}
        if self.tsm.hide_empty_auxblob and self.blobs is not None and not self.blobs["auxblob"]:
            hidden.add("auxblob")
        return [name for name in ATTRIBUTES if name not in hidden]

    def show(self, name: str) -> bytes:
        """Read an attribute. EINVAL: blobs before a whole inblob, or the firmware or SVSM refused."""
        self.tsm.fail(name)
        if name == "provider":
            return f"{self.tsm.require_provider()}\n".encode()
        if name == "privlevel_floor":
            return f"{self.tsm.machine.guest_vmpl}\n".encode()
        if name == "generation":
            return f"{self.write_generation}\n".encode()
        self.tsm.require_provider()
        if not self.inblob:
            _refuse(errno.EINVAL)
        if self.blobs is None or self.read_generation != self.write_generation:
            self.blobs = self.request()
            self.read_generation = self.write_generation
        blob = self.blobs[name]
        if len(blob) > OUTBLOB_MAX:
            _refuse(errno.EFBIG)
        return blob

    def store(self, name: str, value: bytes) -> None:
        """Write an attribute and advance the generation. EINVAL: not what the attribute takes; EBUSY: it would wrap."""
        self.tsm.fail(name)
        if name == "inblob":
            self._advance()
            self.inblob = value
            return
        text = value.decode("latin-1")
        if name == "privlevel":
            privlevel = _uint(text)
            if not self.tsm.machine.guest_vmpl <= privlevel <= HIGHEST_VMPL:
                _refuse(errno.EINVAL)
            self._advance()
            self.privlevel = privlevel
        elif name == "service_provider":
            self._advance()
            self.service_provider = text.removesuffix("\n")
        elif name == "service_guid":
            found = _GUID.match(text)
            if found is None:
                _refuse(errno.EINVAL)
            self._advance()
            self.service_guid = uuid.UUID(found.group())
        else:
            version = _uint(text)
            self._advance()
            self.service_manifest_version = version

    def _advance(self) -> None:
        """Count a successful write; the kernel refuses to overtake the reader by a whole round."""
        following = (self.write_generation + 1) % _GENERATION_MODULUS
        if following == self.read_generation:
            _refuse(errno.EBUSY)
        self.write_generation = following

    def request(self) -> dict[str, bytes]:
        """Ask the firmware, or the SVSM, for what the blobs are read from. Raises OSError as their drivers fail."""
        if len(self.inblob) != REPORT_DATA_SIZE:
            _refuse(errno.EINVAL)
        try:
            if self.service_provider is None:
                report, table = self.tsm.driver.report_new(self.inblob, self.privlevel)
                return {"outblob": report, "manifestblob": b"", "auxblob": table[: certificate_extent(table)]}
            svsm = self.tsm.svsm
            if self.service_provider != SERVICE_PROVIDER or svsm is None:
                _refuse(errno.EINVAL)
            if self.service_guid == _NULL_GUID:
                report, manifest, table = svsm.attest_services(self.inblob)
            else:
                report, manifest, table = svsm.attest_single_service(
                    self.inblob, self.service_guid, self.service_manifest_version
                )
        except HardwareError as error:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error
        return {"outblob": report, "manifestblob": manifest, "auxblob": table}


@dataclass
class ConfigfsTsm:
    """The door of one guest: without ``svsm`` a plain SNP guest at VMPL 0, with it a guest at VMPL 2.

    ``provider``: None once the driver has gone (ENXIO). ``failures``: attribute name to the errno that it answers.
    ``after_show``: called with item and attribute name after each read, as a host has time to act there.
    ``driver``: sev-guest, whose state and patience can be set; it serves the device node of this guest, too.
    ``hide_empty_auxblob``: whether an empty auxblob is no file at all, or an empty one as in current kernels.
    """

    machine: SnpMachine
    svsm: Svsm | None = None
    provider: str | None = PROVIDER
    failures: dict[str, int] = field(default_factory=dict)
    after_show: Callable[[ReportItem, str], None] | None = None
    hide_empty_auxblob: bool = False
    items: dict[str, ReportItem] = field(default_factory=dict, init=False)
    driver: SevGuest = field(init=False)

    def __post_init__(self) -> None:
        """Load the driver that plain reports go through, as those of /dev/sev-guest do."""
        self.driver = SevGuest(self.machine)

    @contextlib.contextmanager
    def mounted(self, directory: Path) -> Iterator[Path]:
        """Serve ``directory`` (made if absent) as /sys/kernel/config/tsm until the block ends.

        Raises ImageError if FUSE is missing, HardwareError if the mount does not come up.
        """
        with fuse_mount.mounted(fuse_mount.Files(self), directory):
            yield directory

    def make_item(self, name: str) -> None:
        """Mkdir below ``report``."""
        self.require_provider()
        if name in self.items:
            _refuse(errno.EEXIST)
        self.items[name] = ReportItem(self)

    def drop_item(self, name: str) -> None:
        """Rmdir of a report item."""
        if self.items.pop(name, None) is None:
            _refuse(errno.ENOENT)

    def require_provider(self) -> str:
        """Give the provider's name; ENXIO if the driver has gone."""
        if self.provider is None:
            _refuse(errno.ENXIO)
        return self.provider

    def fail(self, name: str) -> None:
        """Raise what ``failures`` holds for this attribute."""
        if name in self.failures:
            _refuse(self.failures[name])


def _uint(text: str) -> int:
    """Read a number as kstrtouint does with base 0. EINVAL, or ERANGE if it does not fit 32 bits."""
    if _UINT.fullmatch(text) is None:
        _refuse(errno.EINVAL)
    digits = text.strip().lstrip("+").lower()
    try:
        value = int(digits, 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10)
    except ValueError:
        _refuse(errno.EINVAL)
    if value > _UINT_MAX:
        _refuse(errno.ERANGE)
    return value


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
