"""Opening volumes with the real cryptsetup, on plain files: the key goes through a pipe, after the header has passed."""

from __future__ import annotations

import base64
import hashlib
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kagimori_agent import luks
from kagimori_agent.config import Volume
from kagimori_agent.luks import MAX_STDERR, find_device, has_device_mapper, open_volume
from kagimori_protocol.errors import DiskError, ImageError, UsageError

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
OTHER_UUID = "00000000-8a52-4b7e-9c8c-0d6f3c7f2a11"
MAPPING_UUID = "CRYPT-LUKS2-6f1c1a588a524b7e9c8c0d6f3c7f2a11-cryptroot"
KEY = hashlib.sha256(b"an unlock key of these tests").digest()
WRONG_KEY = bytes(32)
SIZE = 0x4000
MISC = "235 autofs\n236 device-mapper\n"

pytestmark = pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="there is no cryptsetup")


def _cryptsetup(*arguments: str, key: bytes = KEY) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["cryptsetup", "-q", *arguments], input=key, capture_output=True, check=False)


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one honest volume, to be copied and never changed."""
    device = tmp_path_factory.mktemp("luks") / "honest"
    with device.open("wb") as file:
        file.truncate(17 << 20)
    options = ["--uuid", UUID, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    made = _cryptsetup("luksFormat", *options, str(device))
    assert made.returncode == 0, made.stderr
    return device


@pytest.fixture
def disk(formatted: Path, tmp_path: Path) -> Path:
    """Give a copy of the honest volume that a test may spoil."""
    copy = tmp_path / "disk"
    shutil.copyfile(formatted, copy)
    return copy


def _volume(device: Path | None, uuid: str = UUID) -> Volume:
    return Volume(uuid=uuid, name="cryptroot", device=device)


def _prove(device: Path, key: bytes = KEY, timeout_s: float = 30) -> str:
    return open_volume(_volume(device), key, prove=True, timeout_s=timeout_s)


def _forge(device: Path, old: bytes, new: bytes, *, nth: int) -> None:
    """Replace the ``nth`` occurrence of a text in both copies of a header, and make both checksums right."""
    assert len(old) == len(new)
    with device.open("r+b") as file:
        for offset in (0, SIZE):
            file.seek(offset)
            copy = bytearray(file.read(SIZE))
            at = -1
            for _ in range(nth):
                at = copy.index(old, at + 1)
            copy[at : at + len(new)] = new
            copy[448:512] = bytes(64)
            copy[448:480] = hashlib.sha256(copy).digest()
            file.seek(offset)
            file.write(copy)


def _refused(call: Callable[[], object], code: str) -> DiskError:
    with pytest.raises(DiskError) as caught:
        call()
    error = caught.value
    assert error.code == code
    assert error.expected
    assert error.found
    assert error.todo
    for spelt in (KEY, KEY.hex().encode(), base64.b64encode(KEY), repr(KEY).encode()):
        assert spelt not in str(error).encode()
    return error


def _program(directory: Path, body: str) -> Path:
    """Write a shell script that stands in cryptsetup's place."""
    program = directory / "cryptsetup"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Give a function that puts a shell script in cryptsetup's place."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr(luks, "DIRECTORIES", (directory,))
    return lambda body: _program(directory, body)


def test_the_right_key_is_proved_without_mapping_anything(disk: Path) -> None:
    """This is what a kernel without device-mapper can show, and the answer says that it is no more."""
    before = disk.read_bytes()
    assert _prove(disk) == "proved"
    assert open_volume(_volume(disk), memoryview(KEY), prove=True, timeout_s=30) == "proved"
    assert disk.read_bytes() == before


def test_a_wrong_key_is_named_as_such(disk: Path) -> None:
    """Code 2 of cryptsetup means that no keyslot opened."""
    error = _refused(lambda: _prove(disk, WRONG_KEY), "luks.wrong-key")
    assert "exit code 2" in str(error.found)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_is_neither_padded_nor_cut(disk: Path, size: int) -> None:
    """Cryptsetup would read 32 bytes of 64 and might even open with them."""
    with pytest.raises(UsageError) as caught:
        _prove(disk, bytes(size))
    assert caught.value.code == "luks.key-size"


def test_a_null_cipher_for_the_data_is_what_cryptsetup_itself_takes_and_we_refuse(disk: Path) -> None:
    """THREATS T1: the right key opens the forged volume, and everything written to it is in the clear."""
    _forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=2)
    taken = _cryptsetup("open", "--test-passphrase", "--key-file", "-", str(disk))
    assert taken.returncode == 0
    _refused(lambda: _prove(disk), "luks.cipher")


def test_a_null_cipher_of_the_keyslot_is_refused(disk: Path) -> None:
    """THREATS T1: such a keyslot opens with any key, so the host can choose the volume key."""
    _forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=1)
    _refused(lambda: _prove(disk), "luks.cipher")


def test_a_token_cannot_stand_in_for_the_key(disk: Path) -> None:
    """Cryptsetup tries a header's tokens before the key on its pipe, and reports their success as the key's."""
    added = _cryptsetup("token", "add", "--key-description", "kagimori-test", "--key-slot", "0", str(disk))
    assert added.returncode == 0, added.stderr
    _refused(lambda: _prove(disk, WRONG_KEY), "luks.tokens")


def test_luks1_is_refused(tmp_path: Path) -> None:
    """Version 1 has no checksums and other fields; nothing here judges them."""
    device = tmp_path / "luks1"
    with device.open("wb") as file:
        file.truncate(4 << 20)
    options = ["--type", "luks1", "--uuid", UUID, "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    assert _cryptsetup("luksFormat", *options, str(device)).returncode == 0
    _refused(lambda: _prove(device), "luks.other-volume")


def test_a_header_that_is_refused_never_sees_the_key(disk: Path, instead: Callable[[str], Path]) -> None:
    """Not even the program that would read the key is started."""
    witness = disk.parent / "started"
    instead(f"touch {witness}; cat > {witness}.key; exit 0")
    assert _prove(disk) == "proved"
    assert witness.exists()
    assert witness.with_suffix(".key").read_bytes() == KEY
    witness.unlink()
    for _ in range(2):  # the keyslot's, then what has become the first: the segment's
        _forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=1)
        _refused(lambda: _prove(disk), "luks.cipher")
    assert not witness.exists()


def test_the_key_is_in_no_argument_and_no_environment_while_cryptsetup_runs(
    disk: Path, instead: Callable[[str], Path]
) -> None:
    """Anything in the VM could read those; a pipe's content is for its two ends only."""
    running = disk.parent / "running"
    instead(f'touch {running}; sleep 0.6; exec {shutil.which("cryptsetup")} "$@"')
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_prove(disk)))
    thread.start()
    spelt = [KEY, KEY.hex().encode(), base64.b64encode(KEY), KEY.hex().upper().encode()]
    looked_at = []
    while thread.is_alive():
        for process in Path("/proc").glob("[0-9]*"):
            try:
                shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            except OSError:
                continue
            if b"test-passphrase" in shown and str(disk).encode() in shown:
                looked_at.append(shown)
            assert not any(one in shown for one in spelt)
        time.sleep(0.02)
    thread.join()
    assert answers == ["proved"]
    assert looked_at
    assert all(b"PYTHON" not in shown and b"HOME=" not in shown for shown in looked_at)


def test_cryptsetup_that_does_not_end_is_ended(disk: Path, instead: Callable[[str], Path]) -> None:
    """The host chooses the KDF's costs, so it could make a boot wait for years."""
    instead("exec sleep 60")
    start = time.monotonic()
    _refused(lambda: _prove(disk, timeout_s=0.3), "luks.timeout")
    assert time.monotonic() - start < 10


def test_cryptsetup_that_closes_its_messages_and_stays_is_ended(
    disk: Path, instead: Callable[[str], Path]
) -> None:
    """The end of its messages is not its own end."""
    instead("exec sleep 60 2>&-")
    _refused(lambda: _prove(disk, timeout_s=0.3), "luks.timeout")


def test_cryptsetup_that_cannot_be_killed_is_left_behind(
    disk: Path, instead: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that stalls its disk keeps the process from ending; the boot must still reach its cap."""
    instead("exec sleep 60")
    immortal: list[subprocess.Popen[bytes]] = []
    kill = subprocess.Popen.kill

    def shrug(process: subprocess.Popen[bytes]) -> None:
        immortal.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", shrug)
    monkeypatch.setattr(luks, "_REAP_S", 0.2)
    start = time.monotonic()
    _refused(lambda: _prove(disk, timeout_s=0.3), "luks.timeout")
    assert time.monotonic() - start < 10
    kill(immortal[0])
    immortal[0].wait()


def test_messages_of_cryptsetup_are_bounded_and_printable(disk: Path, instead: Callable[[str], Path]) -> None:
    """A flood is read to its end, so that it blocks nobody, and dropped."""
    instead("cat > /dev/null; printf '\\033[2Jbad ' >&2; head -c 300000 /dev/zero | tr '\\0' x >&2; exit 4")
    error = _refused(lambda: _prove(disk), "luks.wrong-device")
    assert len(str(error.found)) < MAX_STDERR + 100
    assert "bad xxx" in str(error.found)
    assert "\033" not in str(error.found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (1, "luks.parameters"),
        (2, "luks.wrong-key"),
        (3, "luks.memory"),
        (4, "luks.wrong-device"),
        (5, "luks.busy"),
        (77, "luks.cryptsetup"),
    ],
)
def test_each_exit_code_of_cryptsetup_has_a_name(
    disk: Path, instead: Callable[[str], Path], code: int, name: str
) -> None:
    """It may exit before it has read the key; the code tells why, not the broken pipe."""
    instead(f"exec 0<&-; exit {code}")
    _refused(lambda: _prove(disk), name)


def test_a_killed_cryptsetup_is_told_by_its_signal(disk: Path, instead: Callable[[str], Path]) -> None:
    """Such as by the kernel when memory ran out."""
    instead("kill -9 $$")
    assert "signal 9" in str(_refused(lambda: _prove(disk), "luks.cryptsetup").found)


def test_an_image_without_cryptsetup_is_an_error_of_the_image(
    disk: Path, instead: Callable[[str], Path]
) -> None:
    """PATH is not asked, and a program that cannot run is none."""
    with pytest.raises(ImageError) as caught:
        _prove(disk)
    assert caught.value.code == "luks.no-cryptsetup"
    instead("").write_bytes(b"\x7fELF")
    with pytest.raises(ImageError) as caught:
        _prove(disk)
    assert caught.value.code == "luks.no-cryptsetup"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a made-up file system with /sys/class/block, /dev and a /proc/misc that has device-mapper."""
    for directory in ("sys/class/block", "dev/mapper", "dev/cciss", "proc"):
        (tmp_path / "root" / directory).mkdir(parents=True)
    (tmp_path / "root/proc/misc").write_text(MISC)
    return tmp_path / "root"


def _attach(root: Path, name: str, device: Path | None) -> Path:
    (root / "sys/class/block" / name).mkdir()
    node = root / "dev" / name.replace("!", "/")
    if device is not None:
        node.symlink_to(device)
    return node


def _map(root: Path, name: str, uuid: str, dm: str = "dm-0") -> None:
    directory = root / "sys/class/block" / dm / "dm"
    directory.mkdir(parents=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "uuid").write_text(f"{uuid}\n")


def test_a_volume_is_found_by_its_headers_uuid_alone(root: Path, disk: Path, tmp_path: Path) -> None:
    """Empty drives, other file systems and devices without a node are passed over."""
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 8192)
    _attach(root, "sr0", None)
    _attach(root, "sda", other)
    node = _attach(root, "cciss!c0d0p1", disk)
    assert find_device(_volume(None), root) == node
    assert open_volume(_volume(None), KEY, prove=True, timeout_s=30, root=root) == "proved"


def test_two_devices_with_one_uuid_are_refused_and_named(root: Path, disk: Path, tmp_path: Path) -> None:
    """A planted copy wins by whichever order the kernel finds disks in; nobody chooses between them."""
    planted = tmp_path / "planted"
    shutil.copyfile(disk, planted)
    nodes = [_attach(root, "vda", disk), _attach(root, "vdb", planted)]
    error = _refused(lambda: find_device(_volume(None), root), "luks.ambiguous")
    assert all(str(node) in str(error.found) for node in nodes)
    with planted.open("r+b") as file:  # a damaged header is a candidate too
        file.seek(4096)
        file.write(b"x" * 100)
    _refused(lambda: find_device(_volume(None), root), "luks.ambiguous")


def test_no_device_with_the_uuid_is_told_together_with_what_was_looked_at(root: Path, disk: Path) -> None:
    """A missing driver and a wrong UUID look different in this list."""
    error = _refused(lambda: find_device(_volume(None), root), "luks.no-device")
    assert "no block device" in str(error.found)
    node = _attach(root, "vda", disk)
    error = _refused(lambda: find_device(_volume(None, OTHER_UUID), root), "luks.no-device")
    assert str(node) in str(error.found)


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_appears_late_is_waited_for(root: Path, disk: Path, named: bool) -> None:
    """The network may be up before the driver has found the disk."""
    node = root / "dev/vda"

    def attach() -> None:
        time.sleep(0.4)
        _attach(root, "vda", disk)

    thread = threading.Thread(target=attach)
    thread.start()
    volume = _volume(node if named else None)
    assert open_volume(volume, KEY, prove=True, timeout_s=30, root=root) == "proved"
    thread.join()


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_never_appears_is_an_error_in_time(root: Path, named: bool) -> None:
    """The wait is part of the limit for opening, not besides it."""
    volume = _volume(root / "dev/vda" if named else None)
    start = time.monotonic()
    _refused(
        lambda: open_volume(volume, KEY, prove=True, timeout_s=0.5, root=root),
        "luks.read" if named else "luks.no-device",
    )
    assert 0.2 < time.monotonic() - start < 3


def test_a_wrong_or_doubtful_disk_is_not_waited_out(root: Path, disk: Path) -> None:
    """Time does not make one of two copies the right one."""
    for name in ("vda", "vdb"):
        _attach(root, name, disk)
    start = time.monotonic()
    _refused(lambda: open_volume(_volume(None), KEY, prove=True, timeout_s=30, root=root), "luks.ambiguous")
    other = _volume(disk, OTHER_UUID)
    _refused(lambda: open_volume(other, KEY, prove=True, timeout_s=30, root=root), "luks.other-volume")
    assert time.monotonic() - start < 5


def test_a_named_device_must_carry_the_uuid_too(disk: Path, tmp_path: Path) -> None:
    """The host decides what /dev/vda3 is."""
    _refused(lambda: find_device(_volume(disk, OTHER_UUID)), "luks.other-volume")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    _refused(lambda: find_device(_volume(empty)), "luks.other-volume")
    _refused(lambda: find_device(_volume(tmp_path / "absent")), "luks.read")
    assert find_device(_volume(disk)) == disk


def test_a_header_that_changes_between_two_looks_is_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch, instead: Callable[[str], Path]
) -> None:
    """The host answers each read as it likes: what was searched by is asked again of what is judged."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    monkeypatch.setattr(luks, "probe", lambda _start: OTHER_UUID)
    _refused(
        lambda: open_volume(_volume(disk, OTHER_UUID), KEY, prove=True, timeout_s=30), "luks.other-volume"
    )
    assert not witness.exists()


def test_without_sysfs_there_is_a_named_error(tmp_path: Path) -> None:
    """An initramfs mounts /sys; if it does not, that is what has to change."""
    with pytest.raises(ImageError) as caught:
        find_device(_volume(None), tmp_path)
    assert caught.value.code == "luks.no-sysfs"


def test_without_device_mapper_nothing_is_opened_and_proving_is_not_chosen_instead(
    root: Path, disk: Path, instead: Callable[[str], Path]
) -> None:
    """A boot that believes its disk open when it is not would go wrong later and less clearly."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    (root / "proc/misc").write_text("235 autofs\n236 device-mapper-not\n")
    assert not has_device_mapper(root)
    with pytest.raises(ImageError) as caught:
        open_volume(_volume(disk), KEY, prove=False, timeout_s=30, root=root)
    assert caught.value.code == "luks.no-dm"
    assert "dm-crypt" in str(caught.value.todo)
    assert not witness.exists()
    (root / "proc/misc").unlink()
    assert not has_device_mapper(root)


def test_device_mapper_is_known_by_proc_misc(root: Path) -> None:
    """The kernel lists it there as soon as it can map."""
    assert has_device_mapper(root)


def test_a_volume_is_mapped_under_its_name(root: Path, disk: Path, instead: Callable[[str], Path]) -> None:
    """What cryptsetup is told to do, with a made-up kernel that does it."""
    dm = root / "sys/class/block/dm-0/dm"
    said = disk.parent / "arguments"
    instead(
        f'echo "$@" > {said}; mkdir -p {dm}; echo cryptroot > {dm}/name; echo {MAPPING_UUID} > {dm}/uuid; cat >/dev/null'
    )
    assert open_volume(_volume(disk), KEY, prove=False, timeout_s=30, root=root) == "mapped"
    arguments = said.read_text().split()
    assert arguments[-2:] == [str(disk), "cryptroot"]
    assert "--test-passphrase" not in arguments


def test_a_mapping_that_cryptsetup_only_claims_is_not_believed(
    root: Path, disk: Path, instead: Callable[[str], Path]
) -> None:
    """What is told as opened goes into the verifier's ledger; the kernel must agree."""
    instead("cat > /dev/null")
    _refused(lambda: open_volume(_volume(disk), KEY, prove=False, timeout_s=30, root=root), "luks.not-mapped")


def test_a_volume_that_is_mapped_already_is_done(
    root: Path, disk: Path, instead: Callable[[str], Path]
) -> None:
    """A second attempt in one boot, after another volume failed, must not trip over the first's success."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    _map(root, "cryptroot", MAPPING_UUID)
    _map(root, "swap", "LVM-x", dm="dm-1")
    assert open_volume(_volume(disk), KEY, prove=False, timeout_s=30, root=root) == "mapped"
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("cryptroot", f"CRYPT-LUKS2-{OTHER_UUID.replace('-', '')}-cryptroot"),
        ("cryptroot", MAPPING_UUID.replace("LUKS2", "LUKS1")),
        ("cryptroot", MAPPING_UUID.replace("LUKS2", "PLAIN")),
        ("cryptroot", ""),
        ("luks-root", MAPPING_UUID.replace("cryptroot", "luks-root")),
    ],
)
def test_a_mapping_that_is_not_exactly_ours_refuses_the_volume(
    root: Path, disk: Path, name: str, uuid: str
) -> None:
    """Whoever took the name first, or opened the volume with another key, decides nothing here."""
    _map(root, name, uuid)
    _refused(lambda: open_volume(_volume(disk), KEY, prove=False, timeout_s=30, root=root), "luks.mapping")
