"""A boot with a plot: what happens in the guest meanwhile, what its root does afterwards, and how the host behaves.

Scripts come on disks of their own, which nothing measures, so that one initramfs and one accepted boot serve all tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.boot import machine
from tests.boot.estate import Site
from tests.boot.machine import PLAIN, Disk, Firmware, Machine

_SECTOR: Final = 512
_CRYPT: Final = "console=ttyS0 root=/dev/mapper/cryptroot ro no_timer_check"
"""As the tests' own command line, but that a panic does not start anew: with panic=, initramfs-tools gives no shell."""

ROOT_TOOLS: Final = r"""
export PATH=/bin
b=/bin/busybox
$b mkdir -p /run/snp
$b mount -t ext4 -o ro /dev/disk/by-id/virtio-snp /run/snp
for each in dev proc run; do $b mount -o bind /$each /run/snp/$each; done
$b mount -o rbind /sys /run/snp/sys
cat /dev/disk/by-id/virtio-toml >/run/agent.toml
for each in /sys/class/net/e*; do
    $b ip link set "${each##*/}" up
    $b ip address add 10.0.2.15/24 dev "${each##*/}"
done
# What root of the booted system does with the agent that is installed there.
agent() {
    verb=$1
    shift
    { $b chroot /run/snp /usr/bin/kagimori-agent "$verb" --config /run/agent.toml "$@" 2>&1; echo "code $?"; } |
        sed "s/^/root: $verb: /"
}
"""
"""For scripts of the booted root: the real agent, with network, on the disk that simulates."""


@dataclass(frozen=True)
class Scene:
    """``meanwhile`` is a script that the initramfs runs before Kagimori's, ``booted`` one that the booted root runs.

    ``cmdline`` in place of the tests' own; ``words`` are QEMU's; ``dump`` is a file that the guest may write as a disk;
    ``disks`` are those that the host attaches beside; ``network`` and ``firmware`` are others than usual.
    """

    meanwhile: str = ""
    booted: str = ""
    cmdline: str | None = None
    words: Sequence[str] = ()
    dump: Path | None = None
    disks: Sequence[Disk] = ()
    tpm: bool = True
    network: str | None = None
    firmware: Firmware = PLAIN


def with_shell(more: str) -> str:
    """Give a command line under which a shell can come."""
    return f"{_CRYPT} {more}"


@contextmanager
def played(site: Site, verifier: str | None, scene: Scene) -> Iterator[Machine]:
    """Switch the VM on, in this scene."""
    images = site.estate.images
    disks = [Disk(site.estate.volume, "root"), Disk(images.hardware, "snp"), *scene.disks]
    scripts = {
        "scene": scene.meanwhile,
        "booted": scene.booted,
        "toml": site.estate.agent_toml,
    }
    for serial, text in scripts.items():
        if text:
            disks.append(Disk(as_disk(site.directory / serial, text), serial))
    words = list(scene.words)
    if scene.dump is not None:
        words += ["-drive", f"file={scene.dump},if=none,id=dump,format=raw"]
        words += ["-device", "virtio-blk-pci,drive=dump,serial=dump"]
    cmdline = scene.cmdline or images.variant.cmdline
    boots = ["-kernel", str(images.kernel), "-initrd", str(site.estate.initramfs), "-append", cmdline, *words]
    with machine.switch_on(
        site.directory / "vm",
        boots=boots,
        disks=disks,
        verifier=verifier,
        tpm=scene.tpm,
        network=scene.network,
        firmware=scene.firmware,
    ) as running:
        yield running


def as_disk(path: Path, text: str) -> Path:
    """Write a text as a disk, which has whole sectors: line breaks fill the last one."""
    content = text.encode()
    path.write_bytes(content + b"\n" * (-len(content) % _SECTOR))
    return path
