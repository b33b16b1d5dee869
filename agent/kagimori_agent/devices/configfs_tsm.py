"""Attestation reports from Linux's configfs-tsm: a directory per request, attributes in, blobs out.

Source: the kernel's Documentation/ABI/testing/configfs-tsm-report and
drivers/virt/coco/{guest/report.c,sev-guest}; a plain report is there from Linux 6.7 on, a service's report
(only under an SVSM) from 6.11 on.

What makes the two calls below right, and is easy to get wrong:

- Every request has a directory of its own with a random name, and it is removed whatever happens.
- ``inblob`` is exactly 64 bytes in one write(); the kernel takes it at close(), and may swallow an error
  there. That the request was taken at all shows only in ``generation``, which counts successful writes.
- ``generation`` is read first, again once the report is there, and again after the last blob. Any other
  number than expected means that the blobs may belong to different requests: such data is refused, never
  returned.
- Under an SVSM the default ``privlevel`` 0 is below the guest's own VMPL and fails with EINVAL.
- A request that failed is not repeated. Hosts throttle guest requests, and Linux wipes its VM communication
  key after some failures, so that nothing in this boot gets a report again. Only a changed generation is
  tried anew.

Import budget: the standard library and the error tree.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from kagimori_agent.devices.report import PlainReport, require_over
from kagimori_agent.devices.tsm_entry import Entry, GenerationChanged, explain
from kagimori_protocol import transcript
from kagimori_protocol.errors import HardwareError, ImageError, UsageError
from kagimori_protocol.snp_layout import REPORT_DATA_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path("/sys/kernel/config/tsm")
SERVICE_PROVIDER: Final = "svsm"

MAX_ATTEMPTS: Final = 3
"""Requests made while the generation keeps changing. Two disturbances are bad luck, three another program."""

_MANIFEST_VERSION_MAX: Final = 0xFFFFFFFF

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """A report that an SVSM asked for, over a nonce and the ``manifest`` that speaks for one of its services.

    ``certificates`` may be empty, or padded with zeros to 16 KiB.
    """

    report: bytes
    manifest: bytes
    certificates: bytes


class ConfigfsTsm:
    """The report door at ``root`` (the kernel's, or a simulator's with the same behaviour)."""

    def __init__(self, root: Path = ROOT) -> None:
        """Remember where the door is; nothing is opened before a report is asked for."""
        self.root = root

    def plain_report(self, report_data: bytes) -> PlainReport:
        """Ask AMD's firmware for a report with these 64 bytes of REPORT_DATA, at the guest's own VMPL.

        May block for a minute while the host throttles. Raises ImageError (kernel option or attribute
        missing), HardwareError (each errno by name), UsageError (size, rights).
        """
        _require_size(report_data, "REPORT_DATA")

        def ask(entry: Entry) -> PlainReport:
            provider = entry.provider()
            entry.start()
            floor = entry.privlevel_floor()
            if floor is not None:
                entry.write("privlevel", str(floor).encode())
            entry.write("inblob", report_data)
            report = entry.report()
            certificates = entry.optional_blob("auxblob")
            entry.require_generation("auxblob")
            require_over(report, report_data)
            return PlainReport(report, certificates, provider)

        return self._ask(ask)

    def look_for_services(self) -> str:
        """Give the provider's name, once it is seen that an SVSM's services can be asked; asks for no report.

        Raises ImageError without an SVSM or before Linux 6.11; otherwise as ``plain_report``.
        """

        def look(entry: Entry) -> str:
            provider = entry.provider()
            entry.require_service_attributes()
            return provider

        return self._ask(look)

    def service_report(
        self, nonce: bytes, service_guid: uuid.UUID | str, manifest_version: int = 0
    ) -> ServiceReport:
        """Ask the SVSM to attest one service over a 64-byte nonce (AMD 58019, SVSM_ATTEST_SINGLE_SERVICE).

        Raises ImageError also when the kernel shows no service attributes, that is without an SVSM or before
        6.11; otherwise as ``plain_report``. ``privlevel`` is left alone: the SVSM's own VMPL counts.
        """
        _require_size(nonce, "an SVSM nonce")
        guid = _guid(service_guid)
        if not 0 <= manifest_version <= _MANIFEST_VERSION_MAX:
            raise UsageError(
                "A manifest version is out of range.",
                code="tsm.manifest-version",
                expected="32 bits",
                found=str(manifest_version),
            )

        def ask(entry: Entry) -> ServiceReport:
            entry.provider()
            entry.require_service_attributes()
            entry.start()
            entry.write("service_provider", SERVICE_PROVIDER.encode())
            entry.write("service_guid", guid.encode())
            entry.write("service_manifest_version", str(manifest_version).encode())
            entry.write("inblob", nonce)
            report = entry.report()
            manifest = entry.blob("manifestblob")
            certificates = entry.optional_blob("auxblob")
            entry.require_generation("auxblob")
            if not manifest:
                raise HardwareError(
                    "The SVSM gave no manifest for the service.",
                    code="tsm.manifest",
                    expected=f"a manifest of service {guid}, version {manifest_version}",
                    found="an empty manifestblob",
                    todo="Use an SVSM build with this service (COCONUT: FEATURES=vtpm).",
                )
            require_over(report, transcript.svsm_report_data(nonce, manifest))
            return ServiceReport(report, manifest, certificates)

        return self._ask(ask)

    def guest_vmpl(self) -> int:
        """Tell the strongest VMPL that this guest may name: its own; 0 where the kernel knows no floor. Raises as above."""
        with self._entry() as entry:
            return entry.privlevel_floor() or 0

    def _ask(self, ask: Callable[[Entry], T]) -> T:
        """Make the request in a directory of its own; again in a fresh one only if the generation changed."""
        for _ in range(MAX_ATTEMPTS - 1):
            with contextlib.suppress(GenerationChanged), self._entry() as entry:
                return ask(entry)
        with self._entry() as entry:
            return ask(entry)

    @contextlib.contextmanager
    def _entry(self) -> Iterator[Entry]:
        path = self.root / "report" / f"kagimori-{secrets.token_hex(8)}"
        try:
            path.mkdir()
        except FileNotFoundError:
            raise self._explain_absence() from None
        except OSError as error:
            raise explain(error, "making a request's directory", path) from error
        try:
            yield Entry(path)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what matters
                path.rmdir()
            raise
        try:
            path.rmdir()
        except OSError as error:
            raise explain(error, "removing a request's directory", path) from error

    def _explain_absence(self) -> ImageError:
        """Say which layer is missing, from the outside in."""
        configfs = self.root.parent
        expected = f"the directory {self.root / 'report'}"
        if not configfs.is_dir():
            return ImageError(
                "The kernel has no configfs.",
                code="tsm.no-configfs",
                expected=expected,
                found=f"no {configfs}",
                todo="Build the kernel with CONFIG_CONFIGFS_FS, or put its module into the initramfs.",
            )
        if not self.root.is_dir() and not os.path.ismount(configfs):
            return ImageError(
                "configfs is not mounted.",
                code="tsm.not-mounted",
                expected=expected,
                found=f"{configfs} is not a mount point",
                todo=f"mount -t configfs configfs {configfs}",
            )
        return ImageError(
            "The kernel has no report door (configfs-tsm).",
            code="tsm.no-tsm",
            expected=expected,
            found=f"{configfs} without {self.root.name}/report",
            todo="Use Linux 6.7 or newer with CONFIG_TSM_REPORTS and CONFIG_SEV_GUEST; `modprobe sev-guest`.",
        )


def _require_size(data: bytes, name: str) -> None:
    if len(data) != REPORT_DATA_SIZE:
        raise UsageError(
            f"{name} has the wrong size; it is never padded or cut.",
            code="tsm.inblob-size",
            expected=f"{REPORT_DATA_SIZE} bytes",
            found=f"{len(data)} bytes",
        )


def _guid(service_guid: uuid.UUID | str) -> str:
    try:
        return str(uuid.UUID(str(service_guid)))
    except ValueError as error:
        raise UsageError(
            "A service GUID is none.",
            code="tsm.guid",
            expected="8-4-4-4-12 hex digits",
            found=repr(service_guid),
        ) from error
