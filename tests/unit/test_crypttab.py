"""Device options of crypttab reach cryptsetup; what would make another kind of volume stops the building of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from kagimori_agent import crypttab
from kagimori_protocol.errors import ImageError

OPTIONS = (
    "luks,initramfs,discard,no-read-workqueue,tries=3,keyscript=/lib/x,key-slot=1,x-initrd.attach,size=512"
)


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
    carried = crypttab.lines_for(table, ["cryptroot", "data"])
    assert carried == "cryptroot - - discard,no-read-workqueue\ndata - - read-only\n"
    again = _table(tmp_path, carried)
    assert crypttab.flags("cryptroot", again) == ["--allow-discards", "--perf-no_read_workqueue"]
    assert crypttab.flags("data", again) == ["--readonly"]
    assert crypttab.lines_for(again, ["cryptroot", "data"]) == carried


def test_a_system_without_crypttab_has_no_options(tmp_path: Path) -> None:
    """Not every system names its volumes there."""
    assert crypttab.flags("cryptroot", tmp_path / "crypttab") == []
    assert crypttab.lines_for(tmp_path / "crypttab", ["cryptroot"]) == ""


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
        crypttab.lines_for(table, ["cryptroot"])
    assert caught.value.code == "crypttab.option"
    assert crypttab.lines_for(table, ["other"]) == ""


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
