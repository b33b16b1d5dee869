"""What each rival adds to the initramfs of one and the same image, and what the largest parts of ours are."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from bench import boot_images
from bench.boot_images import OURS, RIVALS
from tests.boot import contents

PARTS: Final = (
    ("Python's interpreter", "usr/bin/python3"),
    ("the library of cryptography", "cryptography/hazmat/bindings/_rust"),
    ("cryptography's modules", "usr/lib/kagimori/python/cryptography"),
    ("requests and what it imports", "usr/lib/kagimori/python/requests"),
    ("requests and what it imports", "usr/lib/kagimori/python/urllib3"),
    ("requests and what it imports", "usr/lib/kagimori/python/charset_normalizer"),
    ("requests and what it imports", "usr/lib/kagimori/python/idna"),
    ("requests and what it imports", "usr/lib/kagimori/python/certifi"),
    ("tpm2-pytss and cffi", "usr/lib/kagimori/python/tpm2_pytss"),
    ("tpm2-pytss and cffi", "usr/lib/kagimori/python/_cffi_backend"),
    ("msgspec", "usr/lib/kagimori/python/msgspec"),
    ("the agent itself", "usr/lib/kagimori/python/kagimori_"),
    ("Python's compiled modules", "lib-dynload/"),
    ("Python's standard library", "usr/lib/python3"),
    ("kernel modules", "/modules/"),
    ("system libraries", "x86_64-linux-gnu/"),
)
"""Names of parts, and what the paths of their files have in them; the first that fits."""
REST: Final = "programs and scripts"
MB: Final = 1_000_000


def rows(rivals: Path, agent_toml: str, scratch: Path, suite: str) -> Iterator[str]:
    """Make each initramfs and weigh it; give the lines of both tables."""
    yield f"| initramfs of {suite} | compressed MB | unpacked MB | more, compressed | more, unpacked |"
    yield "|---|---|---|---|---|"
    plain: tuple[int, int] | None = None
    before: dict[str, bytes] = {}
    image = b""
    for name in ("", *RIVALS, OURS):
        chroot = boot_images.copied(rivals, scratch / (name or "plain") / "root", [name], agent_toml, suite)
        image = boot_images.initramfs(chroot).read_bytes()
        shutil.rmtree(chroot)
        size = len(image), len(contents.unpacked(image))
        plain = plain or size
        more = [(one - first) / MB for one, first in zip(size, plain, strict=True)]
        words = [f"{one / MB:.1f}" for one in size] + [f"+{one:.2f}" if name else "" for one in more]
        yield f"| {'+ ' + name if name else 'plain'} | {' | '.join(words)} |"
        before = before or contents.files(image)
    yield ""
    yield "| part of what kagimori adds | compressed MB | unpacked MB |"
    yield "|---|---|---|"
    for part, packed, whole in parts(before, contents.files(image)):
        yield f"| {part} | {packed / MB:.2f} | {whole / MB:.2f} |"


def parts(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[tuple[str, int, int]]:
    """Give the parts of what was added, the largest first: name, bytes compressed by itself, bytes unpacked."""
    by_part: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path, content in after.items():
        if before.get(path) != content:
            by_part[part_of(path)][path] = content
    weighed = [
        (name, contents.packed_size(files), sum(map(len, files.values()))) for name, files in by_part.items()
    ]
    return sorted(weighed, key=lambda one: -one[1])


def part_of(path: str) -> str:
    """Name the part that a file belongs to."""
    return next((name for name, within in PARTS if within in path), REST)
