"""Measured boots: each log replays to the PCRs, and each part moves exactly the PCRs that it moves on a real machine."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import UsageError
from kagimori_simulator import pe
from kagimori_simulator.event_log import BANKS, Event, EventType, MeasuredBoot, same
from kagimori_simulator.measured_boot import (
    Disk,
    Firmware,
    GrubLoader,
    SecureBoot,
    Shim,
    Uki,
    direct,
    grub,
    uki,
)

if TYPE_CHECKING:
    from pathlib import Path

NAMES = {number: name for name, number in BANKS.items()}
KERNEL = pe.image({".text": b"another kernel"})
ZERO = bytes(32)
SEPARATOR_ONLY = hashlib.sha256(ZERO + hashlib.sha256(bytes(4)).digest()).digest()


def replay(log: bytes, bank: int = 0x000B) -> dict[int, bytes]:
    """Replay a crypto-agile log with nothing but its own header; gives each PCR that it mentions."""
    at = 32 + struct.unpack_from("<I", log, 28)[0]
    count = struct.unpack_from("<I", log, 32 + 24)[0]
    sizes = dict(struct.unpack_from("<HH", log, 32 + 28 + 4 * index) for index in range(count))
    pcrs: dict[int, bytes] = {}
    while at < len(log):
        pcr, kind, digests = struct.unpack_from("<III", log, at)
        at, found = at + 12, {}
        for _ in range(digests):
            algorithm = struct.unpack_from("<H", log, at)[0]
            found[algorithm] = log[at + 2 : at + 2 + sizes[algorithm]]
            at += 2 + sizes[algorithm]
        data = log[at + 4 : at + 4 + struct.unpack_from("<I", log, at)[0]]
        at += 4 + len(data)
        if kind != 3:
            old = pcrs.get(pcr, bytes(sizes[bank]))
            pcrs[pcr] = hashlib.new(NAMES[bank], old + found[bank]).digest()
        elif data.startswith(b"StartupLocality\x00"):
            pcrs[0] = data[-1].to_bytes(sizes[bank], "big")
    assert at == len(log)
    return pcrs


BOOTS = {
    "grub": grub(),
    "grub without shim": grub(shim=None),
    "grub without secure boot": grub(secure_boot=SecureBoot(enabled=False)),
    "grub, started from locality 3": grub(firmware=Firmware(startup_locality=3)),
    "uki": uki(),
    "uki with load options": uki(load_options="single"),
    "direct": direct(),
}


@pytest.mark.parametrize("boot", BOOTS.values(), ids=BOOTS.keys())
def test_a_log_replays_to_the_pcrs_in_every_bank(boot: MeasuredBoot) -> None:
    """An independent replay of the written bytes comes to the same values."""
    log = boot.event_log()
    for bank, number in BANKS.items():
        replayed = replay(log, number)
        zero = bytes(hashlib.new(bank).digest_size)
        for pcr in range(16):
            assert boot.pcr(pcr, bank) == replayed.get(pcr, zero), (bank, pcr)


@pytest.mark.parametrize(
    ("boot", "moved"),
    [
        (grub(), {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14}),
        (grub(shim=None), {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
        (uki(), {0, 1, 2, 3, 4, 5, 6, 7, 9, 11}),
        (uki(load_options="single"), {0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12}),
        (direct(), {0, 1, 2, 3, 4, 5, 6, 7, 9}),
    ],
)
def test_a_pcr_without_events_is_zero(boot: MeasuredBoot, moved: set[int]) -> None:
    """Policies govern such PCRs too, so no builder may touch more than its boot way does."""
    assert {pcr for pcr in range(16) if boot.pcr(pcr) != ZERO} == moved
    separators = {event.pcr for event in boot.events if event.type == EventType.SEPARATOR}
    assert separators == set(range(8))
    assert boot.pcr(2) == boot.pcr(3) == boot.pcr(6) == SEPARATOR_ONLY


CHANGES = {
    "grub: kernel": (grub(), grub(kernel=KERNEL), {4, 9}),
    "grub: kernel that nobody verifies": (
        grub(secure_boot=SecureBoot(enabled=False)),
        grub(secure_boot=SecureBoot(enabled=False), kernel=KERNEL),
        {9},
    ),
    "grub: initramfs": (grub(), grub(initramfs=b"another"), {9}),
    "grub: command line": (grub(), grub(cmdline="root=/dev/sda init=/bin/sh"), {8, 9}),
    "grub: configuration": (grub(), grub(loader=GrubLoader(config=b"another")), {9}),
    "grub: commands": (grub(), grub(loader=GrubLoader(commands=("set default=1",))), {8}),
    "grub: grub": (grub(), grub(loader=GrubLoader(image=KERNEL)), {4}),
    "grub: shim": (grub(), grub(shim=Shim(image=KERNEL)), {4}),
    "grub: owner's keys": (grub(), grub(shim=Shim(mok_list=b"another")), {14}),
    "grub: revocations": (grub(), grub(shim=Shim(sbat_level=b"sbat,1,2030010100\n")), {7}),
    "grub: firmware": (grub(), grub(firmware=Firmware(version="another")), {0}),
    "grub: firmware volume": (grub(), grub(firmware=Firmware(volumes=((0, b"another"),))), {0}),
    "grub: ACPI": (grub(), grub(firmware=Firmware(acpi_tables=(b"DSDT with more in it",))), {1}),
    "grub: boot entry": (grub(), grub(firmware=Firmware(boot_entries=(b"another",))), {1}),
    "grub: partition table": (grub(), grub(disk=Disk(partitions=())), {5}),
    "grub: db": (grub(), grub(secure_boot=SecureBoot(db=b"another")), {7}),
    "uki: kernel": (uki(), uki(image=Uki(linux=KERNEL)), {4, 11}),
    "uki: initramfs": (uki(), uki(image=Uki(initrd=b"another")), {4, 9, 11}),
    "uki: command line": (uki(), uki(image=Uki(cmdline="init=/bin/sh")), {4, 9, 11}),
    "uki: release": (uki(), uki(image=Uki(osrel=b"ID=another")), {4, 11}),
    "uki: load options": (uki(), uki(load_options="single"), {12}),
    "direct: kernel": (direct(), direct(kernel=KERNEL), {4}),
    "direct: initramfs": (direct(), direct(initramfs=b"another"), {9}),
    "direct: command line": (direct(), direct(cmdline="init=/bin/sh"), {9}),
}


@pytest.mark.parametrize(("before", "after", "moved"), CHANGES.values(), ids=CHANGES.keys())
def test_a_part_moves_its_own_pcrs_and_no_others(
    before: MeasuredBoot, after: MeasuredBoot, moved: set[int]
) -> None:
    """What a verifier learns from a changed PCR is which part changed."""
    assert {pcr for pcr in range(16) if before.pcr(pcr) != after.pcr(pcr)} == moved


def digests(boot: MeasuredBoot, pcr: int) -> list[bytes]:
    """Give the SHA-256 digests of one PCR's events, in order."""
    return [event.digest("sha256") for event in boot.events if event.pcr == pcr and event.extends]


def sha256(data: bytes) -> bytes:
    """Hash."""
    return hashlib.sha256(data).digest()


def test_grub_hashes_commands_without_prefix_and_nul() -> None:
    """As in all 800 PCR 8 events of the recorded logs; the log's text has both."""
    boot = grub(cmdline="ro quiet", loader=GrubLoader(commands=("set a=b",)))
    texts = [event.data for event in boot.events if event.pcr == 8]
    assert texts == [
        b"grub_cmd: set a=b\x00",
        b"grub_cmd: linux /vmlinuz ro quiet\x00",
        b"kernel_cmdline: /vmlinuz ro quiet\x00",
        b"grub_cmd: initrd /initrd.img\x00",
    ]
    measured = [b"set a=b", b"linux /vmlinuz ro quiet", b"/vmlinuz ro quiet", b"initrd /initrd.img"]
    assert digests(boot, 8) == [sha256(text) for text in measured]


def test_grub_hands_the_command_line_over_without_a_nul() -> None:
    """The kernel's stub hashes UTF-16 with BOOT_IMAGE in front, as in the recorded Ubuntu 24.04 log."""
    boot = grub(cmdline="ro", initramfs=b"files")
    assert digests(boot, 9)[-2:] == [sha256("BOOT_IMAGE=/vmlinuz ro".encode("utf-16-le")), sha256(b"files")]


def test_the_recorded_ubuntu_log_hashes_its_command_line_as_the_builder_does(vectors: Path) -> None:
    """The builder's rule, applied to that machine's command line, gives the digest in its log."""
    line = "/vmlinuz-6.8.0-1010-gcp root=PARTUUID=8270f3c9-b4e4-4345-80ee-5a62db7ebf3f ro console=ttyS0,115200 panic=-1"
    path, _, cmdline = line.partition(" ")
    boot = grub(loader=GrubLoader(kernel_path=path), cmdline=cmdline)
    log = (vectors / "eventlog/ubuntu-2404-amd-sevsnp.bin").read_bytes()
    ours = {event.digest("sha256") for event in boot.events if event.pcr == 8 and line.encode() in event.data}
    ours |= {event.digest("sha256") for event in boot.events if b"LoadOptions" in event.data}
    assert len(ours) == 3
    assert all(digest in log for digest in ours)


def test_qemu_appends_its_own_word_to_a_direct_boot() -> None:
    """LoadOptions are UTF-16 with `` initrd=initrd`` and a NUL, as measured under QEMU."""
    boot = direct(cmdline="ro", initramfs=b"files")
    assert digests(boot, 9) == [sha256("ro initrd=initrd\x00".encode("utf-16-le")), sha256(b"files")]


def test_a_uki_measures_each_section_as_name_and_content() -> None:
    """The name with its NUL first, then the content; sections come in systemd-stub's order."""
    image = Uki(cmdline="ro", initrd=b"files")
    measured = [
        part for name, content in image.sections.items() for part in (name.encode() + b"\x00", content)
    ]
    assert digests(uki(image=image), 11) == [sha256(part) for part in measured]
    assert list(image.sections) == [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"]


def test_secure_boot_decides_whose_command_line_a_uki_uses() -> None:
    """With it, load options are measured and ignored; without it, the kernel gets them."""
    off = SecureBoot(enabled=False)
    assert digests(uki(load_options="single"), 9) == digests(uki(), 9)
    assert digests(uki(load_options="single", secure_boot=off), 9)[0] == sha256(
        "single\x00".encode("utf-16-le")
    )


def test_a_boot_variable_is_hashed_by_its_value_and_a_driver_variable_whole() -> None:
    """EV_EFI_VARIABLE_BOOT hashes VariableData only, EV_EFI_VARIABLE_DRIVER_CONFIG the whole structure."""
    events = grub(firmware=Firmware(boot_entries=(b"entry",))).events
    boot_entry = next(event for event in events if event.measured == b"entry")
    assert boot_entry.data.endswith("Boot0000".encode("utf-16-le") + b"entry")
    secure = next(event for event in events if event.type == EventType.EFI_VARIABLE_DRIVER_CONFIG)
    assert secure.measured == secure.data
    assert secure.data.endswith("SecureBoot".encode("utf-16-le") + b"\x01")


def test_an_image_is_measured_by_its_authenticode_hash() -> None:
    """Not by its file hash, which would change when somebody signs it."""
    assert digests(direct(kernel=KERNEL), 4)[-1] == sha256(pe.authenticode_input(KERNEL))
    assert sha256(pe.authenticode_input(KERNEL)) != sha256(KERNEL)


def test_the_startup_locality_is_logged_first_and_extends_nothing() -> None:
    """EV_NO_ACTION with zero digests; PCR 0 starts at the locality."""
    boot = direct(firmware=Firmware(startup_locality=3))
    assert boot.pcr(0) != direct().pcr(0)
    assert boot.pcr(1) == direct().pcr(1)
    log = boot.event_log(["sha256"])
    first = struct.pack("<III", 0, 3, 1) + struct.pack("<H", 0x0B) + bytes(32) + struct.pack("<I", 17)
    assert first + b"StartupLocality\x00\x03" in log


@pytest.mark.parametrize("banks", [[], ["sha256", "md5"]])
def test_a_log_needs_known_banks(banks: list[str]) -> None:
    """None at all would hide every event."""
    with pytest.raises(UsageError):
        direct().event_log(banks)


def test_a_changed_boot_must_change_something() -> None:
    """A test that alters no event would prove nothing."""
    boot = direct()
    assert boot.changed(lambda event: event.pcr == 9, lambda _: None).pcr(9) == ZERO
    other = boot.changed(lambda event: event.pcr == 9, lambda event: replace(event, measured=b"else"))
    assert other.pcr(9) != boot.pcr(9)
    with pytest.raises(UsageError):
        boot.changed(lambda event: event.pcr == 23, lambda event: event)


@given(
    events=st.lists(
        st.builds(
            Event,
            st.integers(0, 15),
            st.sampled_from([kind for kind in EventType if kind != EventType.NO_ACTION]),
            st.binary(max_size=80),
            st.binary(max_size=80),
        ),
        max_size=12,
    )
)
def test_any_events_make_a_log_that_replays(events: list[Event]) -> None:
    """Whatever the data: lengths and digests are always consistent."""
    boot = MeasuredBoot("any", tuple(events))
    replayed = replay(boot.event_log(["sha1", "sha256"]))
    assert all(boot.pcr(pcr) == replayed.get(pcr, ZERO) for pcr in range(16))


def test_informative_events_extend_nothing() -> None:
    """EV_NO_ACTION has zero digests in the log."""
    event = same(0, EventType.NO_ACTION, b"for your information")
    assert event.digest("sha384") == bytes(48)
    assert MeasuredBoot("any", (event,)).pcr(0) == ZERO


@pytest.mark.parametrize("raw", [b"", b"MZ", b"bzImage" * 100, b"MZ" + bytes(200)])
def test_firmware_starts_pe_images_only(raw: bytes) -> None:
    """Anything else is a named error, never a struct.error."""
    with pytest.raises(UsageError, match="PE32"):
        direct(kernel=raw)


@given(raw=st.binary(max_size=400))
def test_no_bytes_make_the_pe_reader_stumble(raw: bytes) -> None:
    """UsageError or a result."""
    for candidate in (raw, KERNEL[: len(raw)], KERNEL[:64] + raw):
        try:
            pe.authenticode_input(candidate)
        except UsageError:
            continue


def test_a_signature_does_not_change_the_authenticode_hash() -> None:
    """Checksum, certificate table entry and the certificates at the end are what signing changes."""
    image = pe.image({".text": b"code" * 300, ".data": b""})
    signed = bytearray(image)
    optional = 0x40 + 24
    signed[optional + 64 : optional + 68] = b"\xff\xff\xff\xff"
    signed[optional + 144 : optional + 152] = struct.pack("<II", len(image), 16)
    assert pe.authenticode_input(bytes(signed) + b"certificates 16b") == pe.authenticode_input(image)
    for at in (optional + 16, 0x200, len(image) - 1):
        changed = bytearray(image)
        changed[at] ^= 1
        assert pe.authenticode_input(bytes(changed)) != pe.authenticode_input(image)


def test_a_section_name_must_fit() -> None:
    """Eight bytes; longer ones need a string table, which firmware does not read."""
    with pytest.raises(UsageError):
        pe.image({".verylongname": b""})
