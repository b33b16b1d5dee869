"""Event logs for a person: how much of the data may be believed, and what its line and its difference say."""

from __future__ import annotations

import hashlib
import struct

import pytest

from kagimori_verifier.verify.eventlog import Event
from kagimori_verifier.verify.eventlog_measured import Covers, measured_part
from kagimori_verifier.verify.eventlog_names import LINE_LENGTH, RECORDED_LENGTH, describe, first_difference

NO_ACTION, SEPARATOR, TAG, IPL = 0x3, 0x4, 0x6, 0xD
VARIABLE, BOOT_VARIABLE, APPLICATION, AUTHORITY = 0x80000001, 0x80000002, 0x80000003, 0x800000E0


def sha256(data: bytes) -> bytes:
    """Hash for the one bank of these events."""
    return hashlib.sha256(data).digest()


def one(pcr: int, kind: int, data: bytes, hashed: bytes) -> Event:
    """Make one event whose SHA-256 digest is over ``hashed``."""
    return Event(1, pcr, kind, {"sha256": sha256(hashed)}, data)


def variable(name: str, value: bytes, tail: bytes = b"") -> bytes:
    """Write a UEFI_VARIABLE_DATA."""
    return struct.pack("<16sQQ", bytes(16), len(name), len(value)) + name.encode("utf-16-le") + value + tail


@pytest.mark.parametrize(
    ("logged", "covers"),
    [
        (one(0, SEPARATOR, bytes(4), bytes(4)), Covers.DATA),
        (one(7, VARIABLE, variable("db", b"v"), variable("db", b"v")), Covers.DATA),
        (one(1, BOOT_VARIABLE, variable("Boot0001", b"v"), b"v"), Covers.VARIABLE_DATA),
        (one(7, AUTHORITY, variable("Shim", b"v", b"\0\xaf"), variable("Shim", b"v", b"\0")), Covers.DATA),
        (one(8, IPL, b"grub_cmd: boot\0", b"boot"), Covers.TEXT),
        (one(8, IPL, b"kernel_cmdline: /vmlinuz ro\0", b"/vmlinuz ro"), Covers.TEXT),
        (one(8, IPL, b"grub_cmd boot\0", b"boot\0"), Covers.TEXT),
        (one(11, IPL, ".linux\0".encode("utf-16-le"), b".linux\0"), Covers.SECTION_NAME),
        (one(12, IPL, "quiet\0".encode("utf-16-le"), "quiet\0".encode("utf-16-le")), Covers.DATA),
        (one(12, IPL, "quiet\0".encode("utf-16-le"), "quiet".encode("utf-16-le")), Covers.DATA),
    ],
)
def test_data_is_believed_as_far_as_its_type_is_documented_to_be_hashed(
    logged: Event, covers: Covers
) -> None:
    """The bytes that come back are those under the digest, and the line says nothing of "not measured"."""
    measured = measured_part(logged)
    assert measured is not None
    assert measured.covers is covers
    assert sha256(measured.part) == logged.digest()
    assert ("not measured" in describe(logged)) == (covers is Covers.VARIABLE_DATA)


@pytest.mark.parametrize(
    "logged",
    [
        one(0, SEPARATOR, bytes(4), b"something else"),
        one(0, NO_ACTION, b"StartupLocality\0\x03", b"StartupLocality\0\x03"),
        one(9, IPL, b"/vmlinuz\0", b"/vmlinuz\0"),
        one(9, IPL, b"/vmlinuz\0", b"/vmlinuz"),
        one(14, IPL, b"MokList\0", b"MokList\0"),
        one(8, IPL, b"grub_cmd: boot\0", b"grub_cmd: boot"),
        one(8, IPL, b"other: boot\0", b"boot"),
        one(1, VARIABLE, variable("Boot0001", b"v"), b"v"),
        one(1, BOOT_VARIABLE, variable("Boot0001", b"v", b"tail"), b"v"),
        one(7, AUTHORITY, variable("db", b"v"), variable("db", b"v")[:-1]),
        one(11, IPL, ".linux\0".encode("utf-16-le"), b"content of the kernel"),
        one(9, TAG, struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0", b"content"),
    ],
)
def test_text_beside_a_digest_of_something_else_is_marked(logged: Event) -> None:
    """Also where the digest is a hash of it in a way that this type is never hashed."""
    assert measured_part(logged) is None
    assert "not measured" in describe(logged)


def test_an_event_is_not_believed_in_a_bank_that_it_lacks() -> None:
    """Without a digest nothing vouches for the data."""
    assert measured_part(one(0, SEPARATOR, bytes(4), bytes(4)), "sha384") is None
    assert measured_part(Event(1, 0, SEPARATOR, {"0x0012": bytes(32)}, b""), "0x0012") is None


FILE_PATH = "\\EFI\\debian\\shimx64.efi\0".encode("utf-16-le")
DEVICE_PATH = (
    bytes.fromhex("02010c00d041030a00000000") + struct.pack("<BBH", 4, 4, 4 + len(FILE_PATH)) + FILE_PATH
)
LOAD_OPTION = struct.pack("<IH", 1, 0) + "debian\0".encode("utf-16-le")


@pytest.mark.parametrize(
    ("logged", "line"),
    [
        (
            one(7, VARIABLE, variable("SecureBoot", b"\x01"), variable("SecureBoot", b"\x01")),
            "PCR 7 SecureBoot = 01",
        ),
        (
            one(1, BOOT_VARIABLE, variable("BootOrder", b"\2\0\1\0"), b"\2\0\1\0"),
            "PCR 1 BootOrder = 0002,0001 ",
        ),
        (
            one(1, BOOT_VARIABLE, variable("Boot0002", LOAD_OPTION), LOAD_OPTION),
            "PCR 1 Boot0002 = debian (name not",
        ),
        (
            one(9, IPL, b"/vmlinuz-6.1.0\0", b""),
            "PCR 9 GRUB read /vmlinuz-6.1.0 (file content; name not measured)",
        ),
        (one(8, IPL, b"grub_cmd: set a=b\0", b"set a=b"), "PCR 8 grub_cmd: set a=b"),
        (one(9, TAG, struct.pack("<II", 0x8F3B22EC, 0), b""), "PCR 9 Linux initrd (content digest; name not"),
        (one(11, IPL, ".linux\0".encode("utf-16-le"), b".linux\0"), "PCR 11 UKI section name .linux"),
        (
            one(4, APPLICATION, struct.pack("<QQQQ", 0, 0, 0, len(DEVICE_PATH)) + DEVICE_PATH, b""),
            "PCR 4 boot application \\EFI\\debian\\shimx64.efi (image digest; path not measured)",
        ),
        (
            one(4, APPLICATION, b"", b"image"),
            "PCR 4 boot application (image digest; no path: a kernel, where a boot loader started it)",
        ),
        (
            one(14, IPL, b"MokList\0", b"keys of the owner"),
            "PCR 14 shim's MokList (content digest; name not measured)",
        ),
        (
            one(12, IPL, "Credentials initrd\0".encode("utf-16-le"), b"an archive"),
            "PCR 12 beside the UKI: Credentials initrd (content digest; name not measured)",
        ),
        (
            one(13, IPL, "System extension initrd\0".encode("utf-16-le"), b"an archive"),
            "PCR 13 beside the UKI: System extension initrd (content digest; name not measured)",
        ),
        (one(3, 0x1234, b"\x01\x02", b"\x01"), "PCR 3 event type 0x00001234 0102 (not measured)"),
    ],
)
def test_an_event_is_described_in_one_line(logged: Event, line: str) -> None:
    """A person reads what it is about, in the specification's words."""
    assert describe(logged).startswith(line)


def test_a_terminal_never_sees_an_escape_out_of_a_log() -> None:
    """Escape sequences, line breaks and right-to-left marks are shown, not sent."""
    grub = describe(one(8, IPL, b"grub_cmd: \x1b[2J\n\x07\0", b"\x1b[2J\n\x07"))
    name = describe(one(7, VARIABLE, variable("db\u202e\x1b]0;\x07", b""), b""))
    for line in (grub, name):
        assert line.isascii()
        assert line.isprintable()
    assert "\\u202e\\x1b]0;\\x07" in name


def test_a_long_text_gives_way_to_the_mark_that_it_is_not_measured() -> None:
    """Nobody can push the mark off the line."""
    line = describe(one(9, IPL, b"/" + b"a" * 5000 + b"\0", b""))
    assert line.endswith("... (file content; name not measured)")
    assert len(line) == LINE_LENGTH


def reference(*contents: bytes) -> list[tuple[bytes, str]]:
    """Write what an operator recorded."""
    return [(sha256(content), f"file {content.decode()}") for content in contents]


def files(*contents: bytes) -> list[Event]:
    """Write what GRUB logs for files of these contents."""
    return [one(9, IPL, b"/boot/" + content + b"\0", content) for content in contents]


def test_equal_events_have_no_difference() -> None:
    """Silent events do not count."""
    silent = one(9, NO_ACTION, b"", b"")
    assert first_difference(reference(b"a", b"b"), [*files(b"a"), silent, *files(b"b")]) is None
    assert first_difference([], [silent]) is None


@pytest.mark.parametrize(
    ("expected", "found", "sentence"),
    [
        ((b"a", b"b", b"c"), (b"a", b"x", b"c"), "Event 2 (file b) differs: expected sha256 "),
        ((b"a", b"b"), (b"a", b"x"), "Event 2 (file b) differs: expected sha256 "),
        ((b"a", b"b", b"c"), (b"c", b"b", b"c"), "Event 1 (file a) differs: expected sha256 "),
        ((b"a", b"b", b"c"), (b"x", b"b", b"a"), "Event 1 (file a) differs: expected sha256 "),
        ((b"a", b"b", b"c"), (b"a", b"c"), "Event 2 (file b) is missing: expected sha256 "),
        ((b"a", b"b"), (b"a",), "Event 2 (file b) is missing: expected sha256 "),
        ((b"a",), (), "Event 1 (file a) is missing: expected sha256 "),
        ((b"a", b"b"), (b"a", b"x", b"b"), "Event 2 is not expected: found sha256 "),
        ((b"a",), (b"a", b"a"), "Event 2 is not expected: found sha256 "),
        ((), (b"x",), "Event 1 is not expected: found sha256 "),
    ],
)
def test_the_first_difference_says_whether_an_event_is_missing_extra_or_other(
    expected: tuple[bytes, ...], found: tuple[bytes, ...], sentence: str
) -> None:
    """The sentence has the digests' first digits and what the log calls the event."""
    said = first_difference(reference(*expected), files(*found))
    assert said is not None
    assert said.startswith(sentence)
    if "missing" not in said:
        assert "(GRUB read /boot/" in said


def command(text: str) -> Event:
    """Write what GRUB logs for a command."""
    return one(8, IPL, f"grub_cmd: {text}\0".encode(), text.encode())


LONG = f"linux /vmlinuz-6.1.0-56-cloud-amd64 root=UUID={'0' * 36} ro console=tty0 console=ttyS0,115200 earlyprintk=ttyS0"


@pytest.mark.parametrize(
    "recorded", [describe(command(LONG)), describe(command(LONG), limit=RECORDED_LENGTH)]
)
def test_a_word_at_the_end_of_a_long_command_line_is_in_sight(recorded: str) -> None:
    """Both texts are cut where they part, also beside a reference of the time when 120 characters were recorded."""
    said = first_difference([(sha256(LONG.encode()), recorded)], [command(f"{LONG} init=/bin/sh")])
    assert said is not None
    assert "init=/bin/sh)" in said
    assert said.isascii()
    known, _, found = said.partition(", found ")
    assert max(len(known), len(found)) < 2 * LINE_LENGTH


def test_a_change_far_into_a_long_command_line_is_in_sight() -> None:
    """What follows is cut, what stands shortly before is shown."""
    recorded = describe(command(f"{LONG} {'a' * 300}"), limit=RECORDED_LENGTH)
    events = [command(f"{LONG} {'a' * 200} init=/bin/sh {'a' * 300}")]
    said = first_difference([(bytes(32), recorded)], events)
    assert said is not None
    assert "a init=/bin/sh a" in said
    assert said.count("grub_cmd: linux /vmlinuz") == 2


def test_only_what_is_measured_is_recorded_at_length() -> None:
    """The mark that a text is not measured stays in sight."""
    noted = describe(one(9, IPL, b"/" + b"a" * 500 + b"\0", b""), limit=RECORDED_LENGTH)
    assert len(noted) == LINE_LENGTH
    assert len(describe(command("a" * 500), limit=RECORDED_LENGTH)) > LINE_LENGTH
