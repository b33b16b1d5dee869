"""The cap: after it, nothing in this boot can obtain the key again.

A verifier releases a key only while the cap PCR (15 by default) is zero, so extending it ends the chance.
This runs on every way out of the agent, also when the agent died: by a unit or script that switch-root
requires, with nothing but the TPM doors below it. It must be told which driver's TPM has to be there, because
a TPM whose driver loads only *later* would come up uncapped; only for a VM without a vTPM that driver is
None.

*Every* TPM present is capped, and in every active bank, so that no quote shows a zero. The data is
``b"kagimori/1/cap"``, measured by TPM2_PCR_Event: each bank is extended by its own hash of it. A second run
leaves a PCR alone that already holds exactly the cap (and, in other banks, anything but zero), because the
agent caps and then the unit does: the final value stays one that later programs can know. Any other value is
extended.

Import budget: the standard library, the error tree and ``devices``; the TPM library only once there is a TPM.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_agent.devices import device_class
from kagimori_agent.devices.tpm_places import DRIVER, Place, by_driver, present
from kagimori_protocol.errors import HardwareError, KagimoriError, UsageError

if TYPE_CHECKING:
    from kagimori_agent.devices.vtpm import Vtpm

CAP_DATA: Final = b"kagimori/1/cap"
CAP_DIGEST: Final = hashlib.sha256(CAP_DATA).digest()
CAP_PCR: Final = 15
LAST_STATIC_PCR: Final = 15
"""PCRs after it are of a dynamic launch, or anyone may reset them (TCG PC Client Platform TPM Profile)."""

ATTEMPTS: Final = 3
"""Extensions tried when something else extends the PCR between our reading and our reading back."""

ZERO: Final = bytes(hashlib.sha256().digest_size)
CAPPED: Final = hashlib.sha256(ZERO + CAP_DIGEST).digest()
"""What the SHA-256 bank holds after the first cap of a boot."""


class Capped(NamedTuple):
    """A TPM that is capped: its name (or TCTI), and the SHA-256 PCR before and after (equal if it was)."""

    tpm: str
    before: bytes
    after: bytes


def cap(
    pcr: int = CAP_PCR, *, driver: str | None = DRIVER, tcti: str | None = None, root: Path = Path("/")
) -> list[Capped]:
    """Extend the cap PCR of every TPM present, or of the one behind ``tcti``, and read it back.

    ``driver`` is the one that exactly one TPM must have; None only where evidence has no TPM. Raises when any
    TPM is not capped, after all others were tried: that TPM's ImageError or HardwareError, or HardwareError
    "cap.failed" for several. The caller powers off then.
    """
    if not 0 <= pcr <= LAST_STATIC_PCR:
        raise UsageError(
            "This PCR cannot hold a cap: it can be reset, or does not start at zero.",
            code="cap.pcr",
            expected=f"0 to {LAST_STATIC_PCR}",
            found=str(pcr),
        )
    capped: list[Capped] = []
    errors: list[KagimoriError] = []
    if tcti is not None:
        places = [Place(name=tcti, driver="", tcti=tcti, event_log=Path())]
    else:
        places = present(root)
        if driver is not None:
            try:
                by_driver(driver, root)
            except KagimoriError as error:
                errors.append(error)
    for place in places:
        try:
            capped.append(_cap_one(place, pcr))
        except KagimoriError as error:
            errors.append(error)
        except Exception as error:  # noqa: BLE001 - whatever one TPM does, the next must still be capped
            errors.append(
                HardwareError(
                    f"Capping {place.name} failed.",
                    code="cap.failed",
                    found=f"{type(error).__name__}: {error}",
                )
            )
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise HardwareError(
            "Not every TPM is capped.",
            code="cap.failed",
            expected=f"PCR {pcr} of each extended",
            found="; ".join(" ".join(str(error).split("\n")) for error in errors),
            todo="Power off: whoever gets into this boot could ask for the key again.",
        )
    return capped


def _cap_one(place: Place, pcr: int) -> Capped:
    vtpm: Vtpm
    with device_class("vtpm")(place) as vtpm:
        before = after = _read(vtpm, pcr)
        expected, still_open = CAPPED, _open_banks(vtpm, pcr)
        for attempt in range(ATTEMPTS + 1):
            if after == expected and not still_open:
                return Capped(place.name, before, after)
            if attempt < ATTEMPTS:
                expected = hashlib.sha256(after + CAP_DIGEST).digest()
                vtpm.measure(pcr, CAP_DATA)
                after, still_open = _read(vtpm, pcr), _open_banks(vtpm, pcr)
    raise HardwareError(
        f"PCR {pcr} of {place.name} does not hold the cap after it was extended.",
        code="cap.not-held",
        expected=f"SHA-256 {expected.hex()}, and no bank zero",
        found=f"SHA-256 {after.hex()}, zero in the banks {still_open}",
        todo="Power off: whoever gets into this boot could ask for the key again.",
    )


def _read(vtpm: Vtpm, pcr: int) -> bytes:
    ((_, value),) = vtpm.read_pcrs([pcr])
    return value


def _open_banks(vtpm: Vtpm, pcr: int) -> list[int]:
    """List the active banks (TPM2_ALG numbers) in which the PCR is still zero."""
    return [
        bank
        for bank in vtpm.active_banks(pcr)
        if not any(value for _, digest in vtpm.read_pcrs([pcr], bank) for value in digest)
    ]
