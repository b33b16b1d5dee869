"""The root check lets nothing become the system that does not rest wholly on what the agent opened (THREATS T2)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.root.sysfs import Kernel

from kagimori_agent import opened
from kagimori_agent.config import Config
from kagimori_agent.root_check import BtrfsInfo, Checked, check
from kagimori_protocol.errors import DiskError, ImageError, KagimoriError

SYSROOT = Path("/sysroot")
FSID = "0b2dbd9f-8b2f-4f0c-9d0b-6c5c2f2c7d11"


def checked(config: Config, kernel: Kernel, devices: int = 1) -> Checked:
    """Check the root of a made-up kernel, whose btrfs has so many devices."""
    return check(config, SYSROOT, kernel.root, lambda _: BtrfsInfo(FSID, devices))


def refused(config: Config, kernel: Kernel, devices: int = 1, code: str = "root.elsewhere") -> str:
    """Hold that the check refuses, and give what it says that it found."""
    with pytest.raises(KagimoriError) as caught:
        checked(config, kernel, devices)
    assert caught.value.code == code
    assert caught.value.expected
    assert caught.value.todo
    return str(caught.value.found)


def lvm_on_the_volume(kernel: Kernel) -> None:
    """Root, /usr and swap are logical volumes of a volume group in cryptroot."""
    for name, mapping in (("dm-1", "vg-root"), ("dm-2", "vg-usr"), ("dm-3", "vg-swap")):
        kernel.upon(name, ["dm-0"], mapping)
    kernel.mount("/sysroot", "/dev/mapper/vg-root", number=kernel.number("dm-1"))
    kernel.mount("/sysroot/usr", "/dev/mapper/vg-usr", number=kernel.number("dm-2"))
    kernel.swap("/dev/dm-3")
    (kernel.root / "sys/power/resume").write_text(f"{kernel.number('dm-3')}\n")


def root_with_the_kernels_own_below(kernel: Kernel) -> None:
    """The root itself, with /dev moved there already, as the udev of initramfs-tools does."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.mount("/sysroot/dev", "udev", "devtmpfs")
    kernel.mount("/sysroot/run", "tmpfs", "tmpfs")
    (kernel.root / "sys/power/resume").write_text("0:0\n")


def swap_in_memory(kernel: Kernel) -> None:
    """A compressed swap that lies in memory alone."""
    root_with_the_kernels_own_below(kernel)
    kernel.disk("zram0")
    (kernel.root / "sys/class/block/zram0/mm_stat").touch()
    kernel.swap("/dev/zram0")
    (kernel.root / "sys/class/block/zram0/backing_dev").write_text("none\n")


def swap_by_its_name(kernel: Kernel) -> None:
    """Without udev's links, a mapping is a node of its own in /dev/mapper; and there is a file on the root."""
    root_with_the_kernels_own_below(kernel)
    kernel.upon("dm-1", ["dm-0"], "vg swap")
    kernel.swap("/dev/mapper/vg\\040swap")
    kernel.swap("/sysroot/swapfile", "file")


def swap_where_dev_has_moved(kernel: Kernel) -> None:
    """The udev of initramfs-tools has moved /dev below the root, and the kernel tells the swap's place from there."""
    lvm_on_the_volume(kernel)
    kernel.mount("/sysroot/dev", "udev", "devtmpfs")
    kernel.upon("dm-4", ["dm-0"], "vg-more")
    kernel.swap("/sysroot/dev/dm-4")


def without_a_journal(kernel: Kernel) -> None:
    """An ext4 that has none, as a small image may."""
    root_with_the_kernels_own_below(kernel)
    kernel.journal("dm-0", None)


def swap_file_of_a_btrfs(kernel: Kernel) -> None:
    """A file on a btrfs, which has the number of no device."""
    kernel.btrfs(FSID, "dm-0")
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", "btrfs", "0:33")
    kernel.swap("/sysroot/swapfile", "file")


def xfs(kernel: Kernel) -> None:
    """An XFS that has its log within."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", "xfs", kernel.number("dm-0"), "rw,noquota")


@pytest.mark.parametrize(
    "laid",
    [
        *(without_a_journal, swap_file_of_a_btrfs, xfs),
        swap_where_dev_has_moved,
        root_with_the_kernels_own_below,
        lvm_on_the_volume,
        swap_in_memory,
        swap_by_its_name,
    ],
    ids=lambda laid: laid.__name__,
)
def test_what_rests_on_the_agents_volume_passes(
    laid: Callable[[Kernel], None], honest: Kernel, config: Config
) -> None:
    """The function's own words say what lies where."""
    laid(honest)
    assert checked(config, honest).mappings == ("cryptroot",)


def test_a_btrfs_of_one_device_passes(honest: Kernel, config: Config) -> None:
    """Its number is of no device, so its devices are asked for."""
    honest.btrfs(FSID, "dm-0")
    honest.mount("/sysroot", "/dev/mapper/cryptroot", "btrfs", "0:33")
    assert checked(config, honest).subjects == ("/sysroot (btrfs of /dev/mapper/cryptroot)",)


def plain_disk(kernel: Kernel) -> str:
    """A disk with the root's file system UUID, which came first."""
    kernel.mount("/sysroot", f"/dev/{kernel.disk('vdb')}")
    return "/sysroot (ext4 of /dev/vdb): vdb: a disk that the agent has not opened"


def plain_partition(kernel: Kernel) -> str:
    """A partition of the very disk that has the volume, too."""
    kernel.mount("/sysroot", f"/dev/{kernel.partition('vda3', 'vda')}")
    return "vda3 on vda: a disk that the agent has not opened"


def same_volume_group(kernel: Kernel) -> str:
    """A volume group of the same name, on a planted disk."""
    kernel.upon("dm-1", [kernel.disk("vdb")], "vg-root")
    kernel.mount("/sysroot", "/dev/mapper/vg-root", number=kernel.number("dm-1"))
    return "dm-1 (vg-root) on vdb: a disk that the agent has not opened"


def linear_over_both(kernel: Kernel) -> str:
    """A logical volume of which one extent lies on a planted disk."""
    kernel.upon("dm-1", ["dm-0", kernel.disk("vdb")], "vg-root")
    kernel.mount("/sysroot", "/dev/mapper/vg-root", number=kernel.number("dm-1"))
    return "dm-1 (vg-root) on vdb: a disk"


def half_a_mirror(kernel: Kernel) -> str:
    """A RAID 1 of which the host has one half."""
    kernel.upon("md127", ["dm-0", kernel.partition("vdb1", kernel.disk("vdb"))])
    kernel.mount("/sysroot", "/dev/md127", number=kernel.number("md127"))
    return "md127 on vdb1 on vdb: a disk"


def another_luks(kernel: Kernel) -> str:
    """A second LUKS disk with the same UUID, opened by somebody under another name."""
    kernel.opened("dm-1", kernel.disk("vdb"), mapping="luks-root")
    kernel.mount("/sysroot", "/dev/mapper/luks-root", number=kernel.number("dm-1"))
    return "dm-1 (luks-root) on vdb: a disk"


def another_usr(kernel: Kernel) -> str:
    """The root is good, and /usr comes from a planted disk."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.mount("/sysroot/usr", f"/dev/{kernel.disk('vdb')}")
    return "/sysroot/usr (ext4 of /dev/vdb): vdb"


def mounted_over(kernel: Kernel) -> str:
    """Something is mounted at the root's place once more."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.mount("/sysroot", f"/dev/{kernel.disk('vdb')}")
    return "/sysroot (ext4 of /dev/vdb): vdb"


def overlay(kernel: Kernel) -> str:
    """A root whose layers the kernel does not tell by device."""
    kernel.mount("/sysroot", "overlay", "overlay")
    return "no block device below it"


def shared_by_the_host(kernel: Kernel) -> str:
    """A directory of the host's, by virtio."""
    kernel.mount("/sysroot", "root", "virtiofs")
    return "no block device below it"


def in_memory(kernel: Kernel) -> str:
    """A root in memory, filled by whoever."""
    kernel.mount("/sysroot", "tmpfs", "tmpfs")
    return "no block device below it"


def loop(kernel: Kernel) -> str:
    """An image file, wherever that lies."""
    kernel.disk("loop0")
    (kernel.root / "sys/class/block/loop0/loop").mkdir()
    kernel.mount("/sysroot", "/dev/loop0")
    return "loop0: a loop device that the agent has not opened"


def second_device_by_option(kernel: Kernel) -> str:
    """An XFS whose log lies elsewhere."""
    kernel.mount(
        "/sysroot", "/dev/mapper/cryptroot", "xfs", kernel.number("dm-0"), "rw,logdev=/dev/vdb,noquota"
    )
    return "a second device (logdev=/dev/vdb)"


def journal_on_a_disk(kernel: Kernel) -> str:
    """An ext4 whose journal the kernel found on a planted disk, by the number or UUID that is in its super block."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.journal("dm-0", f"jbd2/{kernel.disk('vdb')}")
    return "a journal that is not known to lie within (jbd2/vdb)"


def journal_of_another(kernel: Kernel) -> str:
    """A task of a journal that lies in the file system of another device."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.journal("dm-0", "jbd2/dm-01-8")
    return "a journal that is not known to lie within (jbd2/dm-01-8)"


def journal_of_a_task_that_is_gone(kernel: Kernel) -> str:
    """A kernel that names a task which is not there."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    (kernel.root / "sys/fs/ext4/dm-0/journal_task").write_text("9999\n")
    return "a journal that is not known to lie within (nothing is told)"


def journal_untold(kernel: Kernel) -> str:
    """A kernel that says nothing about this ext4."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", "ext3", kernel.number("dm-0"))
    (kernel.root / "sys/fs/ext4/dm-0/journal_task").unlink()
    return "a journal that is not known to lie within (nothing is told)"


def journal_below_the_root(kernel: Kernel) -> str:
    """The root is good, and a volume below it has its journal elsewhere."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.upon("dm-1", ["dm-0"], "vg-usr")
    kernel.mount("/sysroot/usr", "/dev/mapper/vg-usr", number=kernel.number("dm-1"))
    kernel.journal("dm-1", "jbd2/vdb")
    return "/sysroot/usr (ext4 of /dev/mapper/vg-usr): a journal"


def f2fs(kernel: Kernel) -> str:
    """An f2fs may be made of several devices, and no list of the kernel's shows the others."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", "f2fs", kernel.number("dm-0"))
    return "a file system (f2fs) of which the kernel does not tell all devices"


def jfs(kernel: Kernel) -> str:
    """A JFS may have its log elsewhere."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", "jfs", kernel.number("dm-0"))
    return "a file system (jfs) of which"


def by_a_program(kernel: Kernel) -> str:
    """A file system that a program answers for, with a block device beside it."""
    kernel.mount("/sysroot/srv", "/dev/mapper/cryptroot", "fuseblk", kernel.number("dm-0"))
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    return "a file system (fuseblk) of which"


def swap_file_of_several_devices(kernel: Kernel) -> str:
    """A swap file beside the root, in a file system whose devices nobody tells."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.upon("dm-1", ["dm-0"], "vg-swap")
    kernel.mount("/swap", "/dev/mapper/vg-swap", "f2fs", kernel.number("dm-1"))
    kernel.swap("/swap/file", "file")
    return "swap /swap/file: a file system (f2fs) of which"


def swap_on_a_part_of_zram(kernel: Kernel) -> str:
    """A partition of a compressed device that writes to a disk, of which only the whole one tells."""
    swap_written_back(kernel)
    kernel.swap(f"/dev/{kernel.partition('zram0p1', 'zram0')}")
    return "swap /dev/zram0p1: zram0p1 on zram0: a disk"


def swap_on_what_begins_like_zram(kernel: Kernel) -> str:
    """A device that only begins like a compressed one."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.swap(f"/dev/{kernel.disk('zramdisk')}")
    return "swap /dev/zramdisk: zramdisk: a disk"


def swap_on_a_disk(kernel: Kernel) -> str:
    """A swap with the right UUID, on a planted disk."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.swap(f"/dev/{kernel.disk('vdb')}")
    return "swap /dev/vdb: vdb: a disk"


def swap_of_nobody(kernel: Kernel) -> str:
    """A swap whose device went away."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.swap("/dev/vdc\\040(deleted)")
    return "swap /dev/vdc (deleted): a device that the kernel does not list"


def swap_written_back(kernel: Kernel) -> str:
    """A compressed swap that writes to a disk what does not fit."""
    swap_in_memory(kernel)
    (kernel.root / "sys/class/block/zram0/backing_dev").write_text("/dev/vdb\n")
    return "swap /dev/zram0: zram0: a disk"


def resume_device(kernel: Kernel) -> str:
    """The kernel was told to resume from a planted disk."""
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number("dm-0"))
    kernel.disk("vdb")
    (kernel.root / "sys/power/resume").write_text(f"{kernel.number('vdb')}\n")
    return "vdb: a disk"


def unknown_device(kernel: Kernel) -> str:
    """A number that sysfs does not have."""
    kernel.mount("/sysroot", "/dev/vdz", number="254:77")
    return "254:77: a device that the kernel does not list"


@pytest.mark.parametrize(
    "laid",
    [
        *(plain_disk, plain_partition, same_volume_group, linear_over_both, half_a_mirror, another_luks),
        *(another_usr, mounted_over, overlay, shared_by_the_host, in_memory, loop, second_device_by_option),
        *(journal_on_a_disk, journal_of_another, journal_of_a_task_that_is_gone, journal_untold),
        *(journal_below_the_root, f2fs, jfs, by_a_program, swap_file_of_several_devices),
        *(swap_on_a_part_of_zram, swap_on_what_begins_like_zram),
        *(swap_on_a_disk, swap_of_nobody, swap_written_back, resume_device, unknown_device),
    ],
    ids=lambda laid: laid.__name__,
)
def test_what_rests_elsewhere_is_refused_and_named(
    laid: Callable[[Kernel], str], honest: Kernel, config: Config
) -> None:
    """The function's own words say what lies where, and it returns what must be told."""
    told = laid(honest)
    assert told in refused(config, honest)


def test_a_btrfs_with_a_planted_device_is_refused(honest: Kernel, config: Config) -> None:
    """A device that shows the right file system UUID is taken into it by the kernel."""
    honest.disk("vdb")
    honest.btrfs(FSID, "dm-0", "vdb")
    honest.mount("/sysroot", "/dev/mapper/cryptroot", "btrfs", "0:33")
    assert "vdb: a disk" in refused(config, honest, devices=2)


def test_a_btrfs_that_lacks_a_device_is_refused(honest: Kernel, config: Config) -> None:
    """Degraded, it would take the missing one from whichever disk comes later."""
    honest.btrfs(FSID, "dm-0")
    honest.mount("/sysroot", "/dev/mapper/cryptroot", "btrfs", "0:33")
    assert "of 2 devices, of which the kernel lists 1" in refused(config, honest, devices=2)


def test_a_btrfs_that_tells_nothing_is_refused(honest: Kernel, config: Config) -> None:
    """Neither by ioctl nor in sysfs."""
    honest.mount("/sysroot", "/dev/mapper/cryptroot", "btrfs", "0:33")
    assert "does not tell its devices" in refused(config, honest)

    def fails(_: Path) -> BtrfsInfo:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    with pytest.raises(DiskError, match="does not rest"):
        check(config, SYSROOT, honest.root, fails)


def test_a_device_that_rests_on_itself_ends_the_walk(honest: Kernel, config: Config) -> None:
    """No kernel shows one; whatever does is not believed."""
    honest.upon("dm-1", [], "ring")
    (honest.root / "sys/class/block/dm-1/slaves/dm-1").symlink_to(honest.root / "sys/class/block/dm-1")
    honest.mount("/sysroot", "/dev/mapper/ring", number=honest.number("dm-1"))
    assert "too many devices upon each other" in refused(config, honest)


def test_a_root_that_is_not_mounted_is_told_as_such(honest: Kernel, config: Config) -> None:
    """Not as one that rests on nothing bad."""
    refused(config, honest, code="root.not-mounted")


def test_without_an_opened_volume_nothing_passes(kernel: Kernel, config: Config) -> None:
    """Nothing is opened, so nothing can rest on it."""
    kernel.mount("/sysroot", f"/dev/{kernel.disk('vda')}")
    refused(config, kernel, code="root.nothing-opened")


def test_kernel_lists_that_are_missing_or_strange_are_no_yes(honest: Kernel, config: Config) -> None:
    """Neither mounts nor swaps."""
    honest.mount("/sysroot", "/dev/mapper/cryptroot", number=honest.number("dm-0"))
    (honest.root / "proc/swaps").unlink()
    checked(config, honest)  # a kernel without swap
    (honest.root / "proc/swaps").write_text("Filename Type\nodd\n")
    assert "proc_swaps" in refused(config, honest)
    (honest.root / "proc/self/mountinfo").write_text("1 0 0:2 / /root rw ext4\n")
    refused(config, honest, code="root.mounts")
    (honest.root / "proc/self/mountinfo").unlink()
    refused(config, honest, code="root.mounts")
    with pytest.raises(ImageError):
        checked(config, honest)


@pytest.mark.parametrize("lower_first", [True, False])
def test_a_root_with_integrity_passes_and_one_on_the_mapping_below_it_does_not(
    kernel: Kernel, config: Config, lower_first: bool
) -> None:
    """The lower mapping shows what the host has written; only the upper has its key, and is what the agent opened."""
    lower, upper = ("dm-0", "dm-1") if lower_first else ("dm-1", "dm-0")
    kernel.upon(lower, [kernel.disk("vda")], "cryptroot_dif", "CRYPT-INTEGRITY-cryptroot_dif")
    kernel.opened(upper, lower)
    opened.begin(kernel.root)
    opened.remember(config.volumes[0], kernel.root)
    kernel.mount("/sysroot", "/dev/mapper/cryptroot", number=kernel.number(upper))
    assert checked(config, kernel).mappings == ("cryptroot",)
    kernel.mount("/sysroot/usr", "/dev/mapper/cryptroot_dif", number=kernel.number(lower))
    assert f"{lower} (cryptroot_dif) on vda: a disk that the agent has not opened" in refused(config, kernel)
