"""Device options of crypttab reach cryptsetup; what would make another kind of volume stops the building of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from kagimori_agent import crypttab
from kagimori_protocol.errors import ImageError

OPTIONS = (
    "luks,initramfs,discard,no-read-workqueue,tries=3,keyscript=/lib/x,key-slot=1,x-initrd.attach,size=512"
)
UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
VOLUMES = {UUID: "cryptroot", "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a12": "data"}


def _table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "crypttab"
    path.write_text(text)
    return path


def test_device_options_are_honoured_and_where_a_key_comes_from_is_passed_over(tmp_path: Path) -> None:
    """Discard and queues are the operator's to choose; keyscripts, tries and slots are another unlocker's."""
    table = _table(
        tmp_path, f"# target source key options\n\ncryptroot UUID=1 none {OPTIONS}\ndata /dev/sdb none\n"
    )
    assert crypttab.flags("cryptroot", table) == ["--allow-discards", "--perf-no_read_workqueue"]
    assert crypttab.flags("data", table) == []
    assert crypttab.flags("elsewhere", table) == []


def test_an_initramfs_carries_the_options_of_its_own_volumes_alone(tmp_path: Path) -> None:
    """What it carries reads back as the same, and names neither devices nor key files."""
    table = _table(
        tmp_path,
        f"cryptroot UUID=1 none {OPTIONS}\nswap /dev/sdc /dev/urandom swap,plain\ndata UUID=2 /etc/key read-only,readonly\n",
    )
    carried = crypttab.lines_for(table, VOLUMES)
    assert carried == "cryptroot - - discard,no-read-workqueue\ndata - - read-only\n"
    again = _table(tmp_path, carried)
    assert crypttab.flags("cryptroot", again) == ["--allow-discards", "--perf-no_read_workqueue"]
    assert crypttab.flags("data", again) == ["--readonly"]
    assert crypttab.lines_for(again, VOLUMES) == carried


def test_a_system_without_crypttab_has_no_options(tmp_path: Path) -> None:
    """Not every system names its volumes there."""
    assert crypttab.flags("cryptroot", tmp_path / "crypttab") == []
    assert crypttab.lines_for(tmp_path / "crypttab", {UUID: "cryptroot"}) == ""


@pytest.mark.parametrize(
    "options",
    [
        *("plain", "swap", "tmp=ext4", "header=/boot/header", "luks,tcrypt-veracrypt", "offset=8", "skip=1"),
        *("discards", "discard=yes", "no-such-thing", "$(reboot)", "luks,integrity-recalculate"),
    ],
)
def test_what_the_agent_cannot_honour_or_does_not_know_stops_the_building(
    tmp_path: Path, options: str
) -> None:
    """A mapping that differs from what its owner wrote down shows at the next boot, or never."""
    table = _table(tmp_path, f"cryptroot UUID=1 none {options}\n")
    with pytest.raises(ImageError) as caught:
        crypttab.lines_for(table, {UUID: "cryptroot"})
    assert caught.value.code == "crypttab.option"
    assert crypttab.lines_for(table, {UUID: "other"}) == ""


def test_two_lines_of_one_name_are_not_chosen_between(tmp_path: Path) -> None:
    """One name, one mapping."""
    with pytest.raises(ImageError) as caught:
        crypttab.flags("data", _table(tmp_path, "data a none\ndata b none discard\n"))
    assert caught.value.code == "crypttab.option"


def test_a_crypttab_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """It might have said something."""
    with pytest.raises(ImageError) as caught:
        crypttab.flags("data", tmp_path)
    assert caught.value.code == "crypttab.read"


@pytest.mark.parametrize(
    "source",
    [
        *(f"UUID={UUID}", f'UUID="{UUID.upper()}"', f"/dev/disk/by-uuid/{UUID}"),
        *("PARTUUID=5", "LABEL=root", "{dev}/vda3", "{dev}/disk/../vda3", "{dev}/disk/by-label/root"),
    ],
)
def test_a_volume_with_a_second_name_stops_the_building(tmp_path: Path, source: str) -> None:
    """It would be open under agent.toml's name alone, and the operator be asked for its passphrase under the other."""
    disks = tmp_path / "disk"
    (tmp_path / "vda3").touch()
    for name in (f"by-uuid/{UUID}", "by-partuuid/5", "by-label/root"):
        (disks / name).parent.mkdir(parents=True, exist_ok=True)
        (disks / name).symlink_to("../../vda3")
    (disks / "by-label/other").symlink_to("../../vdb")
    text = source.format(dev=tmp_path)
    own = _table(tmp_path, f"cryptroot {text} none luks\nother LABEL=other none luks\nlonely\n")
    assert crypttab.lines_for(own, VOLUMES, disks) == "cryptroot - - -\n"
    table = _table(tmp_path, f"cryptroot UUID={UUID} none luks\nroot2 {text} none luks\n")
    with pytest.raises(ImageError) as caught:
        crypttab.lines_for(table, VOLUMES, disks)
    assert f"no other line for UUID={UUID}" in str(caught.value.expected)
    assert "root2" in str(caught.value.found)


def test_a_second_name_is_seen_where_there_are_no_disks_too(tmp_path: Path) -> None:
    """An image is often made in a chroot, which has no names by udev."""
    table = _table(tmp_path, f"root2 UUID={UUID} none luks\n")
    with pytest.raises(ImageError):
        crypttab.lines_for(table, VOLUMES, tmp_path / "none")
