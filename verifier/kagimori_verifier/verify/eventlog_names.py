"""Event logs for a person: one short line for an event, and where a PCR's events leave a recorded reference.

Nothing here decides anything. Text out of a log is the guest's: it is escaped to printable ASCII, cut short,
and marked "not measured" wherever ``eventlog_measured`` does not vouch for it.

Sources: TCG PC Client Platform Firmware Profile 1.06 (event types and their data); UEFI specification 2.10
(device paths, EFI_LOAD_OPTION); Linux efi-stub-helper.c and systemd's tpm2 documentation (tagged events).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_verifier.verify import eventlog_measured as m
from kagimori_verifier.verify.eventlog_layout import EV_NO_ACTION, SHA256, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LINE_LENGTH: Final = 120
"""Characters of a description at most."""
RECORDED_LENGTH: Final = 1000
"""Characters of one that is recorded, where its digest vouches for all of it: command lines differ at their ends."""

EV_EVENT_TAG: Final = 0x00000006

TYPE_NAMES: Final = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    EV_NO_ACTION: "EV_NO_ACTION",
    m.EV_SEPARATOR: "EV_SEPARATOR",
    m.EV_ACTION: "EV_ACTION",
    EV_EVENT_TAG: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    m.EV_S_CRTM_VERSION: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    m.EV_PLATFORM_CONFIG_FLAGS: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    m.EV_IPL: "EV_IPL",
    0x0000000E: "EV_IPL_PARTITION_DATA",
    0x0000000F: "EV_NONHOST_CODE",
    0x00000010: "EV_NONHOST_CONFIG",
    m.EV_NONHOST_INFO: "EV_NONHOST_INFO",
    m.EV_OMIT_BOOT_DEVICE_EVENTS: "EV_OMIT_BOOT_DEVICE_EVENTS",
    m.EV_EFI_VARIABLE_DRIVER_CONFIG: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    m.EV_EFI_VARIABLE_BOOT: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    m.EV_EFI_GPT_EVENT: "EV_EFI_GPT_EVENT",
    m.EV_EFI_ACTION: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    m.EV_EFI_VARIABLE_BOOT2: "EV_EFI_VARIABLE_BOOT2",
    m.EV_EFI_GPT_EVENT2: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    m.EV_EFI_VARIABLE_AUTHORITY: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}

_TAG_NAMES: Final = {
    0x8F3B22EC: "Linux initrd",
    0x8F3B22ED: "Linux load options",
    0xF5BC582A: "loader.conf",
    0x6C46F751: "devicetree add-on",
    0x49DFFE0F: "initrd add-on",
    0xDAC08E1A: "microcode add-on",
}

_NOT_MEASURED: Final = "not measured"
_NO_PATH: Final = "image digest; no path: a kernel, where a boot loader started it"
_PRINTABLE: Final = range(0x20, 0x7F)
_LATIN1_END: Final = 0x100
_BMP_END: Final = 0x10000

_BYTES_SHOWN: Final = 16
_TEXT_READ: Final = RECORDED_LENGTH
_HEAD: Final = 30
_BEFORE: Final = 30
_TEXT_LENGTH: Final = 4
_TEXT_BYTES: Final = bytes({*_PRINTABLE, *b"\t\n\r"})
_VALUE_SHOWN: Final = 8
_DIGITS_SHOWN: Final = 16
_LOOKAHEAD: Final = 16

_IMAGE_LOAD: Final = struct.Struct(
    "<QQQQ"
)  # UEFI_IMAGE_LOAD_EVENT: location, length, link address, path length
_PATH_NODE: Final = struct.Struct("<BBH")  # EFI_DEVICE_PATH_PROTOCOL: type, sub-type, length
_FILE_PATH: Final = (0x04, 0x04)
_LOAD_OPTION_HEAD: Final = 6  # EFI_LOAD_OPTION: attributes u32, path list length u16, then the description
_GPT_COUNT_OFFSET: Final = 92  # UEFI_GPT_DATA: the header of the partition table, then NumberOfPartitions
_U64: Final = struct.Struct("<Q")
_TAG: Final = struct.Struct("<II")  # TCG_PCClientTaggedEvent: id, size
_BLOB: Final = struct.Struct("<QQ")  # UEFI_PLATFORM_FIRMWARE_BLOB: base, length


class _Line(NamedTuple):
    """A description's parts: ``label`` and ``note`` are ours, ``text`` is the log's."""

    label: str
    text: str = ""
    note: str = ""


def describe(event: Event, bank: str = SHA256, limit: int = LINE_LENGTH) -> str:
    """Say in one line of printable ASCII what an event is about.

    Example: ``PCR 7 SecureBoot = 01``. What the digest in ``bank`` does not vouch for is marked "not
    measured", and has 120 characters at most whatever the ``limit``.
    """
    line = _line(event, bank)
    return _join(f"PCR {event.pcr} ", line, min(limit, LINE_LENGTH) if line.note else limit)


def first_difference(
    expected: Sequence[tuple[bytes, str]], events: Sequence[Event], bank: str = SHA256
) -> str | None:
    """Say where one PCR's ``events`` first leave ``expected`` (digest and description of each), or None.

    Events are counted from 1 within the PCR; EV_NO_ACTION is no event here. Raises NotAuthentic
    (eventlog.bank).
    """
    found = [event for event in events if event.type != EV_NO_ACTION]
    digests = [event.digest(bank) for event in found]
    wanted = [digest for digest, _ in expected]
    at = next((i for i, (a, b) in enumerate(zip(wanted, digests, strict=False)) if a != b), None)
    if at is None:
        if len(wanted) == len(digests):
            return None
        at = min(len(wanted), len(digests))
    ahead = slice(at + 1, at + 1 + _LOOKAHEAD)
    swapped = wanted[at + 1 : at + 2] == digests[at + 1 : at + 2]
    if at == len(digests) or (at < len(wanted) and not swapped and digests[at] in wanted[ahead]):
        return (
            f"Event {at + 1} ({printable(expected[at][1])}) is missing: expected {bank} {_short(wanted[at])}."
        )
    line = _line(found[at], bank)
    name = _join("", line, LINE_LENGTH)
    if at == len(wanted) or (not swapped and wanted[at] in digests[ahead]):
        return f"Event {at + 1} is not expected: found {bank} {_short(digests[at])} ({name})."
    known = printable(expected[at][1])
    if not line.note:
        head = f"PCR {found[at].pcr} "
        known, name = _parting(expected[at][1], head, _join(head, line, RECORDED_LENGTH))
    return (
        f"Event {at + 1} ({known}) differs: expected {bank} {_short(wanted[at])}, "
        f"found {_short(digests[at])} ({name})."
    )


def _parting(known: str, head: str, found: str) -> tuple[str, str]:
    """Cut a recorded description and one that begins with ``head`` to a line each, with where they part in sight."""
    known = printable(known, RECORDED_LENGTH)
    pairs = enumerate(zip(known, found, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), min(len(known), len(found)))
    if max(len(known), len(found)) <= LINE_LENGTH or same < LINE_LENGTH // 2:
        return printable(known), printable(found.removeprefix(head))
    rest = slice(same - _BEFORE, None)
    cut = [f"{text[:_HEAD]}...{text[rest]}" for text in (known, found)]
    return printable(cut[0]), printable(cut[1].removeprefix(head))


def printable(text: str, limit: int = LINE_LENGTH) -> str:
    """Return ``text`` with everything but printable ASCII escaped, cut to ``limit`` characters.

    No terminal escape, line break or right-to-left mark out of a log may reach a person's screen.
    """
    shown = text[: limit + 1]
    if not (shown.isascii() and shown.isprintable()):  # few are not, and a log has hundreds
        shown = "".join(map(_escape, shown))
    return shown if len(shown) <= limit else shown[: max(limit - 3, 0)] + "..."


def _escape(character: str) -> str:
    """Return one character, as an escape unless it is printable ASCII."""
    code = ord(character)
    if code in _PRINTABLE:
        return character
    if code < _LATIN1_END:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < _BMP_END else f"\\U{code:08x}"


def _join(head: str, line: _Line, limit: int) -> str:
    """Put a description's parts together; the log's text gives way where there is too much."""
    before = head + line.label + (" " if line.label and line.text else "")
    after = f" ({line.note})" if line.note else ""
    return before + printable(line.text, limit - len(before) - len(after)) + after


def _short(digest: bytes) -> str:
    """Write as much of a digest as a person compares."""
    return f"{digest.hex()[:_DIGITS_SHOWN]}..."


def _line(event: Event, bank: str) -> _Line:
    """Describe an event without its PCR."""
    measured = m.measured_part(event, bank)
    special = _DESCRIBED.get(event.type)
    line = special(event, measured) if special is not None else None
    if line is not None:
        return line
    name = TYPE_NAMES.get(event.type, f"event type 0x{event.type:08x}")
    return _Line(name, _text(event.data), _unless(measured))


def _unless(measured: m.Measured | None, note: str = _NOT_MEASURED) -> str:
    """Return ``note`` unless the digest vouches for the data."""
    return "" if measured is not None else note


def _text(data: bytes) -> str:
    """Guess how ``data`` is best shown: text and what follows its NUL, UTF-16 of Latin letters, or bytes."""
    head, _, rest = data[:_TEXT_READ].partition(b"\0")
    if len(head) >= _TEXT_LENGTH and not head.translate(None, _TEXT_BYTES):
        text = head.decode("ascii")
        return f"{text} {_bytes(rest)}" if any(rest) else text
    cut = data[: 2 * _TEXT_READ]
    if len(data) % 2 == 0 and any(cut) and not any(cut[1::2]):
        return cut[::2].decode("latin-1").rstrip("\0")
    return _bytes(data)


def _bytes(data: bytes) -> str:
    """Show a few bytes in hexadecimal."""
    return data.hex() if len(data) <= _BYTES_SHOWN else f"{data[:_BYTES_SHOWN].hex()}... {len(data)} bytes"


def _separator(event: Event, measured: m.Measured | None) -> _Line:
    return _Line("separator", _text(event.data), _unless(measured))


def _action(event: Event, measured: m.Measured | None) -> _Line:
    return _Line("firmware action", _text(event.data), _unless(measured))


def _version(event: Event, measured: m.Measured | None) -> _Line:
    return _Line("firmware version", _text(event.data), _unless(measured))


def _gpt(event: Event, measured: m.Measured | None) -> _Line | None:
    if len(event.data) < _GPT_COUNT_OFFSET + _U64.size:
        return None
    (count,) = _U64.unpack_from(event.data, _GPT_COUNT_OFFSET)
    return _Line("partition table (GPT),", f"{count} partitions", _unless(measured))


def _variable(event: Event, measured: m.Measured | None) -> _Line | None:
    variable = m.uefi_variable(event.data)
    if variable is None:
        return None
    note = _unless(measured)
    if measured is not None and measured.covers is m.Covers.VARIABLE_DATA:
        note = "name not measured"
    label = "authority" if event.type == m.EV_EFI_VARIABLE_AUTHORITY else ""
    return _Line(label, f"{variable.name} = {_value(variable)}", note)


def _value(variable: m.UefiVariable) -> str:
    """Show a UEFI variable's value, as far as a line has room for it."""
    name, value = variable.name, variable.value
    if name == "BootOrder":
        return ",".join(f"{number:04x}" for (number,) in struct.iter_unpack("<H", value[: len(value) & ~1]))
    if name.startswith("Boot") and len(value) > _LOAD_OPTION_HEAD:
        description = value[_LOAD_OPTION_HEAD:].decode("utf-16-le", errors="backslashreplace")
        return description.split("\0", 1)[0]
    if name == "SbatLevel":
        return value.decode("ascii", errors="backslashreplace")
    return (value.hex() or "empty") if len(value) <= _VALUE_SHOWN else f"{len(value)} bytes"


def _image(event: Event, _measured: m.Measured | None) -> _Line:
    """Describe a loaded PE image; its digest is the Authenticode hash, which vouches for no data."""
    label = {0x80000003: "boot application", 0x80000004: "boot driver"}.get(event.type, "runtime driver")
    path = _file_path(event.data)
    return _Line(label, path, f"image digest; path {_NOT_MEASURED}" if path else _NO_PATH)


def _file_path(data: bytes) -> str:
    """Join the file names of a UEFI_IMAGE_LOAD_EVENT's device path; empty where there are none."""
    if len(data) < _IMAGE_LOAD.size:
        return ""
    *_, size = _IMAGE_LOAD.unpack_from(data)
    path = data[_IMAGE_LOAD.size : _IMAGE_LOAD.size + size]
    names = []
    offset = 0
    while len(path) - offset >= _PATH_NODE.size:
        kind, sub, length = _PATH_NODE.unpack_from(path, offset)
        if length < _PATH_NODE.size:
            break
        if (kind, sub) == _FILE_PATH:
            name = path[offset + _PATH_NODE.size : offset + length]
            names.append(name.decode("utf-16-le", errors="backslashreplace").rstrip("\0"))
        offset += length
    return "".join(names)


def _blob(event: Event, measured: m.Measured | None) -> _Line | None:
    if measured is not None or len(event.data) != _BLOB.size:
        return None
    base, length = _BLOB.unpack(event.data)
    return _Line("firmware", f"at 0x{base:x}, {length} bytes", f"content digest; place {_NOT_MEASURED}")


def _tagged(event: Event, _measured: m.Measured | None) -> _Line | None:
    if len(event.data) < _TAG.size:
        return None
    tag, _ = _TAG.unpack_from(event.data)
    name = _TAG_NAMES.get(tag, f"event tag 0x{tag:08x}")
    return _Line("", name, f"content digest; name {_NOT_MEASURED}")


def _ipl(event: Event, measured: m.Measured | None) -> _Line | None:
    """Describe what boot loaders log; EV_IPL means something else in each PCR."""
    if measured is not None:
        return _Line(_MEASURED_IPL.get(event.pcr, ""), _text(event.data))
    if event.pcr not in _UNMEASURED_IPL:
        return None
    label, note = _UNMEASURED_IPL[event.pcr]
    return _Line(label, _text(event.data), f"{note}; name {_NOT_MEASURED}")


_MEASURED_IPL: Final = {m.UKI_SECTION_PCR: "UKI section name", m.UKI_COMMAND_LINE_PCR: "UKI command line"}
_UNMEASURED_IPL: Final = {
    m.GRUB_FILE_PCR: ("GRUB read", "file content"),
    m.UKI_SECTION_PCR: ("UKI section", "content digest"),
    m.UKI_COMMAND_LINE_PCR: ("beside the UKI:", "content digest"),
    m.UKI_EXTENSION_PCR: ("beside the UKI:", "content digest"),
    m.SHIM_PCR: ("shim's", "content digest"),
}

_DESCRIBED: Final[dict[int, Callable[[Event, m.Measured | None], _Line | None]]] = {
    m.EV_SEPARATOR: _separator,
    EV_EVENT_TAG: _tagged,
    m.EV_S_CRTM_VERSION: _version,
    m.EV_IPL: _ipl,
    m.EV_EFI_VARIABLE_DRIVER_CONFIG: _variable,
    m.EV_EFI_VARIABLE_BOOT: _variable,
    m.EV_EFI_VARIABLE_BOOT2: _variable,
    0x80000003: _image,
    0x80000004: _image,
    0x80000005: _image,
    m.EV_EFI_GPT_EVENT: _gpt,
    m.EV_EFI_GPT_EVENT2: _gpt,
    m.EV_EFI_ACTION: _action,
    0x80000008: _blob,
    m.EV_EFI_VARIABLE_AUTHORITY: _variable,
}
