"""What is in an initramfs is read as a kernel reads it, and weighed by part."""

from __future__ import annotations

import subprocess

import pytest
from bench import boot_sizes
from bench.__main__ import BENCHES, ONLY_BY_NAME
from tests.boot import contents

REGULAR, DIRECTORY, LINK = 0o100644, 0o040755, 0o120777


def archive(*entries: tuple[str, int, bytes]) -> bytes:
    """Write a newc archive (buffer-format.rst), with its trailer."""
    whole = b""
    for name, mode, content in (*entries, ("TRAILER!!!", 0, b"")):
        fields = [1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        whole += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return whole


def packed(data: bytes) -> bytes:
    """Compress as mkinitramfs does."""
    return subprocess.run(
        ["zstd", "-q", "-c"], input=data, capture_output=True, check=True, timeout=60
    ).stdout


EARLY = archive(("kernel", DIRECTORY, b""), ("kernel/microcode", REGULAR, b"early"))
MAIN = archive(
    ("./usr/bin/python3.11", REGULAR, b"python"), ("bin", LINK, b"usr/bin"), ("etc/motd", REGULAR, b"a")
)


@pytest.mark.parametrize(
    "image",
    [EARLY + bytes(512) + packed(MAIN), EARLY + MAIN, EARLY + bytes(4) + MAIN + bytes(508)],
    ids=["last one compressed", "none compressed", "zeros between and after"],
)
def test_files_of_all_archives_are_found(image: bytes) -> None:
    """Microcode and modules may come before, in archives of their own; links and directories hold no bytes."""
    assert contents.files(image) == {
        "kernel/microcode": b"early",
        "usr/bin/python3.11": b"python",
        "etc/motd": b"a",
    }
    assert len(contents.unpacked(image)) >= len(EARLY + MAIN)


@pytest.mark.parametrize("image", [MAIN[:-8], packed(MAIN)[:-8], b"neither", packed(b"") + MAIN])
def test_what_is_no_initramfs_is_not_taken_for_an_empty_one(image: bytes) -> None:
    """A budget would hold for one without files."""
    with pytest.raises(AssertionError):
        contents.files(image)


def test_what_was_added_is_weighed_by_part_the_largest_first() -> None:
    """What was there before counts only where it has changed."""
    before = {"usr/bin/busybox": b"b", "usr/lib/x86_64-linux-gnu/libc.so.6": b"c"}
    added = {
        "usr/bin/python3.11": bytes(range(256)),
        "usr/lib/kagimori/python/requests/api.pyc": b"r" * 2000,
        "usr/lib/kagimori/python/urllib3/util.pyc": b"u",
        "usr/lib/x86_64-linux-gnu/libc.so.6": b"C",
        "usr/bin/kagimori-agent": b"#",
    }
    found = boot_sizes.parts(before, before | added)
    assert [(name, whole) for name, _, whole in found] == [
        ("Python's interpreter", 256),
        ("requests and what it imports", 2001),
        ("system libraries", 1),
        (boot_sizes.REST, 1),
    ]
    assert [size for _, size, _ in found] == sorted((size for _, size, _ in found), reverse=True)


def test_emulated_machines_are_measured_only_by_name() -> None:
    """Whoever wants the others' three minutes does not get half an hour."""
    assert set(BENCHES) >= ONLY_BY_NAME == {"boot"}
