"""The device that cryptsetup gets for a header: what is set up in which order, and what is left of it on every way out."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.unit.luks.headers import DEVICE_SIZE, HONEST, UUID

from kagimori_agent import header_mirror, keyslots, luks, reencrypt
from kagimori_protocol.errors import DiskError, ImageError, OperatorError
from kagimori_protocol.luks2_change import Image
from kagimori_protocol.luks2_layout import LuksHeader, build, copies

NAME = f"kagimori-header-{UUID}"
SIZE = 1 << 20
SALTS = (bytes(64), bytes(range(64)))
HEADER = LuksHeader(UUID, "", "", 3, 0x4000, 0, HONEST)
JUDGED = build(HEADER, SALTS).ljust(SIZE, b"k")
HEALTHY = "0 2048 mirror 2 7:0 7:1 2/2 1 AA 1 core"
BROKEN = "0 2048 mirror 2 7:0 7:1 1/2 1 AD 1 core"


def _image(raw: bytes = JUDGED) -> Image:
    return Image(HEADER, raw, frozenset({0, 0x4000}), DEVICE_SIZE)


@dataclass
class Kernel:
    """A kernel with loop devices and device-mapper, as far as they are used; ``done`` is what was asked of it."""

    directory: Path
    done: list[str] = field(default_factory=list)
    lacks: str = ""
    status: str = HEALTHY
    table: str = ""
    memory: int = -1

    def loop(self, file: int, size: int, flags: int, ways_out: ExitStack) -> Path:
        """Stand for a loop device."""
        if self.lacks == "loop":
            raise FileNotFoundError(2, "No such file or directory")
        self.memory = self.memory if self.done else file
        number = sum(word.startswith("loop") for word in self.done)
        self.done.append(f"loop {number}: {size}, {flags}, {stat.S_IFMT(os.fstat(file).st_mode):o}")
        ways_out.callback(self.done.append, f"gone {number}")
        return Path(f"/dev/loop{number}")

    def dmsetup(self, *words: str) -> str:
        """Stand for dmsetup."""
        if words[0] == "table":
            return self.table
        self.done.append(" ".join(words))
        if self.lacks == words[0]:
            raise DiskError("dmsetup failed.", code="enrol.dmsetup", expected="-", found="Invalid argument")
        (self.directory / NAME).touch()
        return self.status if words[0] == "status" else ""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Let the module use a made-up one."""
    made = Kernel(tmp_path)
    monkeypatch.setattr(header_mirror, "_loop", made.loop)
    monkeypatch.setattr(header_mirror, "_dmsetup", made.dmsetup)
    monkeypatch.setattr(header_mirror, "MAPPED", tmp_path)
    monkeypatch.setattr(header_mirror, "mapped_name", lambda *_: "root" if made.table else None)
    monkeypatch.setattr(keyslots, "salts", lambda: SALTS)
    return made


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Give a device whose header the host has changed since it was judged, in three places."""
    path = tmp_path / "device"
    shown = bytearray(JUDGED)
    for at in (0, 0x4000, SIZE - 1):
        shown[at] ^= 1
    path.write_bytes(bytes(shown) + b"data" * 100)
    return path


SET_UP = [
    f"loop 0: {SIZE}, 0, 100000",
    f"loop 1: {SIZE}, 16, 100000",
    (
        f"create {NAME} --uuid KAGIMORI-HEADER-{UUID} --table"
        " 0 2048 mirror core 2 1024 nosync 2 /dev/loop0 0 /dev/loop1 0 1 handle_errors"
    ),
]
TAKEN_DOWN = [f"remove --retry {NAME}", "gone 1", "gone 0"]


def test_memory_is_the_first_leg_and_everything_is_taken_down_in_reverse(
    kernel: Kernel, device: Path
) -> None:
    """dm-mirror reads from the first leg of those in sync: the host's disk must never be that."""
    with header_mirror.mirrored(device, _image()) as mirror:
        assert kernel.done == SET_UP
        assert mirror.path == kernel.directory / NAME
        os.fstat(mirror.hold)
    assert kernel.done == SET_UP + TAKEN_DOWN
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mirror.hold)


def test_the_disk_has_what_memory_has_in_the_end_and_its_data_is_not_touched(
    kernel: Kernel, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the host has changed what cryptsetup never read; the primary copy's start comes last."""
    written: list[int] = []
    real = keyslots.write

    def watched(file: int, offset: int, data: bytes) -> None:
        written.append(offset)
        real(file, offset, data)

    monkeypatch.setattr(keyslots, "write", watched)
    with header_mirror.mirrored(device, _image()):
        pass
    assert kernel.done
    assert written == [SIZE - 4096, 0x4000, 0]
    assert device.read_bytes() == JUDGED + b"data" * 100


def test_a_mapping_finds_its_key_by_the_number_that_it_knows_and_an_agent_by_0(
    kernel: Kernel, device: Path
) -> None:
    """A second run in one boot: cryptsetup would refuse the mapping that the first has left (`Mismatching parameters`)."""
    kernel.table = (
        f"0 131072 crypt aes-xts-plain64 :64:logon:cryptsetup:{UUID}-d1 0 253:16 32768 1 sector_size:4096\n"
    )
    with header_mirror.mirrored(device, _image()):
        raw = os.pread(kernel.memory, SIZE, 0)
        assert [list(one.json["digests"]) for one in _read(raw)] == [["1"], ["1"]]
        assert raw[2 * 0x4000 :] == JUDGED[2 * 0x4000 :]
    after = _read(device.read_bytes())
    assert [(one.json, one.seqid) for one in after] == [(HONEST, 4), (HONEST, 4)]


@pytest.mark.parametrize("table", ["0 131072 crypt aes-xts-plain64 00 0 253:16 32768\n", "0 131072 error\n"])
def test_a_mapping_that_names_no_key_leaves_the_number_as_it_is(
    kernel: Kernel, device: Path, table: str
) -> None:
    """Without the kernel's keyring it has the key itself."""
    kernel.table = table
    with header_mirror.mirrored(device, _image()):
        assert os.pread(kernel.memory, SIZE, 0) == JUDGED


def _read(raw: bytes) -> list[LuksHeader]:
    return [one for one in copies(lambda at, size: raw[at : at + size]) if isinstance(one, LuksHeader)]


@pytest.mark.parametrize("ended", [SystemExit(143), KeyboardInterrupt(), DiskError("cryptsetup failed.")])
def test_whatever_ends_the_work_takes_the_devices_down(
    kernel: Kernel, device: Path, ended: BaseException
) -> None:
    """A signal, a mistake, cryptsetup's own failure: the disk has the header by then, too."""
    with pytest.raises(type(ended)), header_mirror.mirrored(device, _image()):
        raise ended
    assert kernel.done == SET_UP + TAKEN_DOWN
    assert device.read_bytes()[:SIZE] == JUDGED


@pytest.mark.parametrize(("lacks", "done"), [("loop", []), ("create", [*SET_UP, "gone 1", "gone 0"])])
def test_a_kernel_that_cannot_is_named_and_nothing_was_changed(
    kernel: Kernel, device: Path, lacks: str, done: list[str]
) -> None:
    """There is no falling back to the header on the disk."""
    kernel.lacks = lacks
    before = device.read_bytes()
    with pytest.raises(ImageError) as caught, header_mirror.mirrored(device, _image()):
        pytest.fail("it was begun")
    assert caught.value.code == "enrol.reencrypt-header"
    assert "CONFIG_DM_MIRROR" in str(caught.value)
    assert kernel.done == done
    assert device.read_bytes() == before


def test_keyslots_of_an_odd_size_are_refused(kernel: Kernel, device: Path) -> None:
    """A mirror has whole sectors; cryptsetup makes none that end elsewhere."""
    with pytest.raises(DiskError) as caught, header_mirror.mirrored(device, _image(JUDGED[:-512])):
        pytest.fail("it was begun")
    assert caught.value.code == "luks.area"
    assert not kernel.done


def test_a_disk_that_takes_no_more_is_seen_and_the_write_that_waits_for_it_fails(
    kernel: Kernel, device: Path
) -> None:
    """What memory alone has would be lost with the power."""
    with header_mirror.mirrored(device, _image()) as mirror:
        assert not mirror.broken()
        kernel.status = BROKEN
        assert mirror.broken()
        mirror.fail()
        kernel.status = "0 2048 error"
        assert not mirror.broken()
    assert f"wipe_table --nolockfs {NAME}" in kernel.done


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Give a system in which a killed run has left its mirror, beside a volume that is in use."""
    for number, (uuid, name) in enumerate(
        {f"CRYPT-LUKS2-{UUID}-x": "x", f"KAGIMORI-HEADER-{UUID}": NAME}.items()
    ):
        directory = tmp_path / f"sys/class/block/dm-{number}/dm"
        directory.mkdir(parents=True)
        (directory / "uuid").write_text(f"{uuid}\n")
        (directory / "name").write_text(f"{name}\n")
    return tmp_path


def test_what_a_killed_run_has_left_is_removed_and_nothing_else(kernel: Kernel, left: Path) -> None:
    """Its loop devices go with it: the kernel clears them with their last user."""
    header_mirror.remove_left(left)
    assert kernel.done == [f"remove --retry {NAME}"]


def test_a_run_that_is_still_going_on_is_named(kernel: Kernel, left: Path) -> None:
    """Two at once would each write the header of the other's key."""
    kernel.lacks = "remove"
    with pytest.raises(OperatorError) as caught:
        header_mirror.remove_left(left)
    assert caught.value.code == "enrol.reencrypt-runs"
    assert NAME in str(caught.value)


@pytest.fixture
def loops() -> None:
    """Only where this machine has loop devices, and we may use them."""
    if not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("no loop devices")


@pytest.mark.usefixtures("loops")
def test_a_loop_device_shows_what_is_in_memory_and_goes_with_its_last_user() -> None:
    """Killed, a run leaves none: the kernel closes its descriptors."""
    with ExitStack() as ways_out:
        file = header_mirror._memory(JUDGED, ways_out)
        path = header_mirror._loop(file, SIZE // 2, 0, ways_out)
        assert path.read_bytes() == JUDGED[: SIZE // 2]
        with pytest.raises(PermissionError):
            os.ftruncate(file, SIZE // 4)
        backing = Path("/sys/class/block") / path.name / "loop/backing_file"
        assert backing.exists()
    assert not backing.exists()


@pytest.mark.usefixtures("loops")
def test_a_loop_device_that_udev_looks_at_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just made, each is looked at: a boot in which the module was only now loaded found all of them in use."""
    left = [BlockingIOError(11, "Resource temporarily unavailable")] * 30
    real = fcntl.flock

    def flock(file: int, how: int) -> None:
        if left:
            raise left.pop()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(header_mirror, "_POLL_S", 0.001)
    with ExitStack() as ways_out:
        file = header_mirror._memory(JUDGED, ways_out)
        assert header_mirror._loop(file, SIZE, 0, ways_out).read_bytes() == JUDGED


class Stubborn:
    """A cryptsetup that does not end before its header's write fails."""

    def __init__(self) -> None:
        """Nobody has failed it yet."""
        self.failed = False
        self.given: list[bytes | None] = []

    def broken(self) -> bool:
        """The disk takes no more."""
        return not self.failed

    def fail(self) -> None:
        """End it."""
        self.failed = True

    def communicate(self, given: bytes | None, timeout: float) -> tuple[None, bytes]:
        """Wait in vain, until it has failed."""
        self.given.append(given)
        if not self.failed:
            raise subprocess.TimeoutExpired("cryptsetup", timeout)
        return None, b"cannot write"


def test_a_cryptsetup_that_waits_for_a_disk_that_takes_no_more_is_ended() -> None:
    """It would wait for ever; and it gets the passphrase once."""
    both = Stubborn()
    assert reencrypt._messages(both, b"p", both) == b"cannot write"  # type: ignore[arg-type]  # one double for both
    assert both.given == [b"p", None]


def test_a_run_that_is_told_to_end_waits_for_its_cryptsetup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cryptsetup stops after the blocks that it is at; until then it needs its header."""
    ended = tmp_path / "ended"
    script = f"trap 'sleep 0.3; touch {ended}; exit 1' TERM; echo ready >&2; while :; do sleep 0.05; done"
    real: Callable[..., bytes] = reencrypt._messages
    told: list[None] = []

    def once(process: subprocess.Popen[bytes], given: bytes | None, mirror: None) -> bytes:
        if not told:
            told.append(None)
            assert process.stderr is not None
            process.stderr.read(5)
            raise SystemExit(143)
        return real(process, given, mirror)

    monkeypatch.setattr(reencrypt, "_messages", once)
    with pytest.raises(SystemExit):
        reencrypt._watched(["/bin/sh", "-c", script], b"p", (), None)
    assert ended.exists()


def test_a_block_device_where_the_kernel_has_no_mirror_is_not_reencrypted(
    kernel: Kernel, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T1: cryptsetup would read its header from the host's disk."""
    kernel.lacks = "create"
    monkeypatch.setattr(reencrypt, "_mode", lambda _: stat.S_IFBLK)
    monkeypatch.setattr(reencrypt, "_watched", lambda *_: pytest.fail("cryptsetup was started"))
    with pytest.raises(ImageError) as caught:
        reencrypt._run(device, _image(), b"p", ["reencrypt"], ())
    assert caught.value.code == "enrol.reencrypt-header"


@pytest.mark.parametrize("verb", ["reencrypt", "repair"])
def test_a_block_device_is_given_its_header_by_the_mirror_alone(
    kernel: Kernel, device: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """T1: not once does it read the disk's."""
    seen: list[str] = []
    monkeypatch.setattr(reencrypt, "_mode", lambda _: stat.S_IFBLK)
    monkeypatch.setattr(luks, "DIRECTORIES", (Path("/usr/sbin"), Path("/sbin")))

    def run(command: list[str], _: bytes, pass_fds: tuple[int, ...], mirror: object) -> object:
        assert isinstance(mirror, header_mirror.Mirror)
        assert pass_fds == (mirror.hold,)
        assert command[1] == verb
        seen.append(" ".join(command[-3:]))
        assert "--force-offline-reencrypt" not in command
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(reencrypt, "_watched", run)
    reencrypt._run(device, _image(), b"p", [verb], ())
    path = kernel.directory / NAME
    assert seen == [f"--header {path} {device}"]
    assert kernel.done == SET_UP + TAKEN_DOWN
