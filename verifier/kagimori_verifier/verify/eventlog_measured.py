"""Which part of an event's data its digest vouches for.

A digest is a fact once the log replays to quoted PCRs; the data beside it is only what somebody wrote there.
It may be believed as far as the digest is a hash of it *in the way its type is documented to be hashed*, and
no further: for a file's content, GRUB logs the path and hashes the content, so a path is never more than a
hint.

The type itself is not authenticated either. Whoever wrote the log could call one event another, as long as
both are hashed the same way; so a rule for, say, the kernel's command line must look at all events of its
PCR.

Sources: TCG PC Client Platform Firmware Profile 1.06 (event types, UEFI_VARIABLE_DATA); GRUB's tpm module
(PCR 8, 9); shim's README.tpm (PCR 7, 14); systemd's TPM2 PCR measurements (PCR 11, 12); and what real logs of
all of these hold.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_verifier.verify.eventlog_layout import HASHES, SHA256, Event

if TYPE_CHECKING:
    from collections.abc import Iterator

EV_SEPARATOR: Final = 0x00000004
EV_ACTION: Final = 0x00000005
EV_S_CRTM_VERSION: Final = 0x00000008
EV_PLATFORM_CONFIG_FLAGS: Final = 0x0000000A
EV_IPL: Final = 0x0000000D
EV_NONHOST_INFO: Final = 0x00000011
EV_OMIT_BOOT_DEVICE_EVENTS: Final = 0x00000012
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_VARIABLE_BOOT: Final = 0x80000002
EV_EFI_GPT_EVENT: Final = 0x80000006
EV_EFI_ACTION: Final = 0x80000007
EV_EFI_VARIABLE_BOOT2: Final = 0x8000000C
EV_EFI_GPT_EVENT2: Final = 0x8000000D
EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0

GRUB_TEXT_PCR: Final = 8
GRUB_FILE_PCR: Final = 9
UKI_SECTION_PCR: Final = 11
UKI_COMMAND_LINE_PCR: Final = 12
UKI_EXTENSION_PCR: Final = 13
SHIM_PCR: Final = 14

GRUB_PREFIXES: Final = (
    b"grub_cmd: ",
    b"kernel_cmdline: ",
    b"module_cmdline: ",
    b"grub_cmd ",  # Red Hat's GRUB 2.02, which also hashes the final NUL
    b"grub_kernel_cmdline ",
)
"""What GRUB writes before the text that it hashes. Not hashed, so a command can pass as a command line."""

_WHOLE: Final = frozenset(
    {
        EV_SEPARATOR,
        EV_ACTION,
        EV_S_CRTM_VERSION,
        EV_PLATFORM_CONFIG_FLAGS,
        EV_NONHOST_INFO,
        EV_OMIT_BOOT_DEVICE_EVENTS,
        EV_EFI_VARIABLE_DRIVER_CONFIG,
        EV_EFI_VARIABLE_BOOT,
        EV_EFI_GPT_EVENT,
        EV_EFI_ACTION,
        EV_EFI_VARIABLE_BOOT2,
        EV_EFI_GPT_EVENT2,
        EV_EFI_VARIABLE_AUTHORITY,
    }
)

_VARIABLE_HEAD: Final = struct.Struct("<16sQQ")  # VariableName (GUID), UnicodeNameLength, VariableDataLength
_UTF16_NUL: Final = b"\0\0"


class Covers(enum.Enum):
    """What of an event's data the digest covers."""

    DATA = "all of it"
    VARIABLE_DATA = "a UEFI variable's value, not its name"
    TEXT = "GRUB's text, not the prefix that says what it is"
    SECTION_NAME = "the name of a UKI's section, in ASCII"


@dataclass(frozen=True, slots=True)
class Measured:
    """The very bytes whose hash is the event's digest, and what they are."""

    covers: Covers
    part: bytes


@dataclass(frozen=True, slots=True)
class UefiVariable:
    """A UEFI_VARIABLE_DATA; ``size`` is its length in bytes, which may be less than the event's data."""

    vendor: bytes
    name: str
    value: bytes
    size: int


def measured_part(event: Event, bank: str = SHA256) -> Measured | None:
    """Return the part of the data that the digest vouches for; None means: believe nothing of it.

    Says nothing about the digest itself, which is a fact only after ``eventlog.replay_to``.
    """
    digest, new = event.digests.get(bank), HASHES.get(bank)
    if digest is None or new is None:
        return None
    for measured in _candidates(event):
        if new(measured.part).digest() == digest:
            return measured
    return None


def uefi_variable(data: bytes) -> UefiVariable | None:
    """Read a UEFI_VARIABLE_DATA at the start of ``data``; None where there is none that fits."""
    if len(data) < _VARIABLE_HEAD.size:
        return None
    vendor, characters, value_size = _VARIABLE_HEAD.unpack_from(data)
    value_start = _VARIABLE_HEAD.size + 2 * characters
    end = value_start + value_size
    if end > len(data):
        return None
    name = data[_VARIABLE_HEAD.size : value_start].decode("utf-16-le", errors="backslashreplace")
    return UefiVariable(vendor, name.rstrip("\0"), data[value_start:end], end)


def _candidates(event: Event) -> Iterator[Measured]:
    """Yield every part of the data that an event of this type and PCR may have hashed."""
    data = event.data
    if event.type in _WHOLE:
        yield Measured(Covers.DATA, data)
    if event.type == EV_EFI_VARIABLE_BOOT:
        # Many builds of EDK2 hash the value alone.
        variable = uefi_variable(data)
        if variable is not None and variable.size == len(data):
            yield Measured(Covers.VARIABLE_DATA, variable.value)
    elif event.type == EV_EFI_VARIABLE_AUTHORITY:
        # Older shims log one stray byte more than they hash.
        variable = uefi_variable(data)
        if variable is not None and variable.size < len(data):
            yield Measured(Covers.DATA, data[:-1])
    elif event.type == EV_IPL:
        yield from _ipl_candidates(event.pcr, data)


def _ipl_candidates(pcr: int, data: bytes) -> Iterator[Measured]:
    """Yield the same for EV_IPL, by PCR; nothing for files (PCR 9) and shim (PCR 14)."""
    if pcr == GRUB_TEXT_PCR:
        for prefix in GRUB_PREFIXES:
            if data.startswith(prefix) and data.endswith(b"\0"):
                yield Measured(Covers.TEXT, data[len(prefix) : -1])
                yield Measured(Covers.TEXT, data[len(prefix) :])
    elif pcr == UKI_SECTION_PCR:
        # systemd-stub hashes the name in ASCII with its NUL, and logs it in UTF-16.
        name = data.removesuffix(_UTF16_NUL) if len(data) % 2 == 0 else b""
        if name and not any(name[1::2]):
            yield Measured(Covers.SECTION_NAME, name[::2] + b"\0")
    elif pcr == UKI_COMMAND_LINE_PCR and len(data) % 2 == 0:
        # systemd-stub's documentation leaves the final NUL out of the hash, its releases do not.
        yield Measured(Covers.DATA, data)
        yield Measured(Covers.DATA, data.removesuffix(_UTF16_NUL))
