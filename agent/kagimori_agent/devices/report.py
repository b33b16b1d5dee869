"""What every report door promises, whichever interface of the kernel lies behind it.

- One report for one call, by one request. What failed is not asked again: hosts throttle guest requests, and Linux wipes
  its message key to the firmware after most failures.
- A report is of the one size that it has, and over the data that was asked for.
- Certificates are the host's, hints at best, and empty where it gave none.
- ``KeyWiped`` is final: nothing in this boot gets a report through that key any more.

Import budget: the standard library, the error tree, and the layout of a report.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp_layout import FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

DEAD_KEY: Final = (
    "Power the VM off and start it again: this boot gets no report any more. `dmesg` has the reason."
)
"""What to do once Linux has given up its message key (VMPCK): it has no other, and gets one only by a new launch."""


class KeyWiped(HardwareError):
    """Linux has given up its message key to the firmware; only a new start of the VM brings another."""

    default_code = "report.key-wiped"


class Meaning(NamedTuple):
    """What an errno says at one door, and what helps."""

    code: str
    what: str
    todo: str


@dataclass(frozen=True, slots=True)
class PlainReport:
    """A report over data of the guest's choice.

    ``report`` is 1184 bytes as AMD's firmware made them; ``certificates`` the host's certificate table, empty
    when it gave none, and never to be trusted; ``provider`` the kernel's name of the driver ("sev_guest").
    """

    report: bytes
    certificates: bytes
    provider: str


class PlainDoor(Protocol):
    """A door that gives reports over data of the guest's choice."""

    def plain_report(self, report_data: bytes) -> PlainReport:
        """Ask for a report over these 64 bytes at the guest's own VMPL.

        May block for a minute and longer: see ``within``. Raises ImageError, HardwareError (KeyWiped for what is final),
        UsageError.
        """


def within(wait_s: float, ask: Callable[[], T]) -> T:
    """Give what ``ask`` gives or raises, or raise HardwareError ``report.stalled`` after ``wait_s`` seconds.

    A request that the kernel has taken cannot be called back, and it may hold whoever made it: Linux itself waits up to a
    minute for a host that throttles, and for one that does not answer at all it waits forever. So it is made by a
    thread, which is left behind when the time is over; it ends with the process, whose end Linux holds until its driver has
    given up (a minute at most). Without any time left nothing is asked.
    """
    given: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            given.append(ask())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="kagimori-report", daemon=True)
    wait_s = max(0.0, wait_s)
    if wait_s:
        thread.start()
        thread.join(min(wait_s, threading.TIMEOUT_MAX))
    if given:
        return given[0]
    if raised:
        raise raised[0]
    raise HardwareError(
        "The report door does not answer.",
        code="report.stalled",
        expected=f"a report within {wait_s:.0f} s, what was left of the boot's time",
        found="none: the host holds the request back, or has lost it",
        todo="Power the VM off and start it again; ask the host's operator about throttling of guest requests.",
    )


def require_over(report: bytes, report_data: bytes) -> None:
    """Raise HardwareError unless the report is over this REPORT_DATA: another one proves nothing of this exchange."""
    place = FIELDS["report_data"]
    found = report[place.offset : place.offset + place.size]
    if found != report_data:
        raise HardwareError(
            "A report is over other data than was asked for.",
            code="report.other-data",
            expected=f"REPORT_DATA {report_data.hex()}",
            found=found.hex(),
            todo="Update the kernel or the SVSM: it answers with the report of another request.",
        )
