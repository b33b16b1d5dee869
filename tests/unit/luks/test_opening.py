"""Opening volumes with the real cryptsetup, on plain files: the key goes through a pipe, after the header has passed."""

from __future__ import annotations

import base64
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_agent import luks
from kagimori_agent.luks import MAX_STDERR
from kagimori_protocol.errors import ImageError, UsageError

if TYPE_CHECKING:
    from tests.unit.luks.conftest import Vault

WRONG_KEY = bytes(32)


def test_the_right_key_is_proved_without_mapping_anything(disk: Path, vault: Vault) -> None:
    """This is what a kernel without device-mapper can show, and the answer says that it is no more."""
    before = disk.read_bytes()
    assert vault.prove(disk) == "proved"
    assert vault.prove(disk, memoryview(vault.key)) == "proved"
    assert disk.read_bytes() == before


def test_a_wrong_key_is_refused_before_cryptsetup_has_it(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """A header that is not authenticated by this key is another's."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    vault.refused(lambda: vault.prove(disk, WRONG_KEY), "luks.mac")
    assert not witness.exists()


def test_a_spoilt_keyslot_is_named_as_such(disk: Path, vault: Vault) -> None:
    """Its area is not authenticated, but nothing opens by it. Code 2 of cryptsetup means that no keyslot opened."""
    with disk.open("r+b") as file:
        file.seek(32768)
        file.write(b"x" * 512)
    error = vault.refused(lambda: vault.prove(disk), "luks.wrong-key")
    assert "exit code 2" in str(error.found)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_is_neither_padded_nor_cut(disk: Path, size: int, vault: Vault) -> None:
    """Cryptsetup would read 32 bytes of 64 and might even open with them."""
    with pytest.raises(UsageError) as caught:
        vault.prove(disk, bytes(size))
    assert caught.value.code == "luks.key-size"


def test_a_null_cipher_for_the_data_is_what_cryptsetup_itself_takes_and_we_refuse(
    disk: Path, vault: Vault
) -> None:
    """THREATS T1: the right key opens the forged volume, and everything written to it is in the clear."""
    vault.forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=2)
    taken = vault.cryptsetup("open", "--test-passphrase", "--key-file", "-", str(disk))
    assert taken.returncode == 0
    vault.refused(lambda: vault.prove(disk), "luks.cipher")


def test_a_null_cipher_of_the_keyslot_is_refused(disk: Path, vault: Vault) -> None:
    """THREATS T1: such a keyslot opens with any key, so the host can choose the volume key."""
    vault.forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=1)
    vault.refused(lambda: vault.prove(disk), "luks.cipher")


def test_a_token_cannot_stand_in_for_the_key(disk: Path, vault: Vault) -> None:
    """Cryptsetup tries a header's tokens before the key on its pipe, and reports their success as the key's."""
    added = vault.cryptsetup(
        "token", "add", "--key-description", "kagimori-test", "--key-slot", "0", str(disk)
    )
    assert added.returncode == 0, added.stderr
    vault.refused(lambda: vault.prove(disk, WRONG_KEY), "luks.tokens")


def test_luks1_is_refused(tmp_path: Path, vault: Vault) -> None:
    """Version 1 has no checksums and other fields; nothing here judges them."""
    device = tmp_path / "luks1"
    with device.open("wb") as file:
        file.truncate(4 << 20)
    options = ["--type", "luks1", "--uuid", vault.uuid, "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    assert vault.cryptsetup("luksFormat", *options, str(device)).returncode == 0
    vault.refused(lambda: vault.prove(device), "luks.other-volume")


def test_a_header_that_is_refused_never_sees_the_key(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """Not even the program that would read the key is started."""
    witness = disk.parent / "started"
    instead(f"touch {witness}; cat > {witness}.key; exit 0")
    assert vault.prove(disk) == "proved"
    assert witness.exists()
    assert witness.with_suffix(".key").read_bytes() == vault.key
    witness.unlink()
    for _ in range(2):  # the keyslot's, then what has become the first: the segment's
        vault.forge(disk, b"aes-xts-plain64", b"cipher_null-ecb", nth=1)
        vault.refused(lambda: vault.prove(disk), "luks.cipher")
    assert not witness.exists()


def test_the_key_is_in_no_argument_and_no_environment_while_cryptsetup_runs(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """Anything in the VM could read those; a pipe's content is for its two ends only."""
    running = disk.parent / "running"
    instead(f'touch {running}; sleep 0.6; exec {shutil.which("cryptsetup")} "$@"')
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(vault.prove(disk)))
    thread.start()
    spelt = [
        vault.key,
        vault.key.hex().encode(),
        base64.b64encode(vault.key),
        vault.key.hex().upper().encode(),
    ]
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


def test_cryptsetup_that_does_not_end_is_ended(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """The host chooses the KDF's costs, so it could make a boot wait for years."""
    instead("exec sleep 60")
    start = time.monotonic()
    vault.refused(lambda: vault.prove(disk, timeout_s=0.3), "luks.timeout")
    assert time.monotonic() - start < 10


def test_cryptsetup_that_closes_its_messages_and_stays_is_ended(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """The end of its messages is not its own end."""
    instead("exec sleep 60 2>&-")
    vault.refused(lambda: vault.prove(disk, timeout_s=0.3), "luks.timeout")


def test_cryptsetup_that_cannot_be_killed_is_left_behind(
    disk: Path, instead: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, vault: Vault
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
    vault.refused(lambda: vault.prove(disk, timeout_s=0.3), "luks.timeout")
    assert time.monotonic() - start < 10
    kill(immortal[0])
    immortal[0].wait()


def test_messages_of_cryptsetup_are_bounded_and_printable(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """A flood is read to its end, so that it blocks nobody, and dropped."""
    instead("cat > /dev/null; printf '\\033[2Jbad ' >&2; head -c 300000 /dev/zero | tr '\\0' x >&2; exit 4")
    error = vault.refused(lambda: vault.prove(disk), "luks.wrong-device")
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
    disk: Path, instead: Callable[[str], Path], code: int, name: str, vault: Vault
) -> None:
    """It may exit before it has read the key; the code tells why, not the broken pipe."""
    instead(f"exec 0<&-; exit {code}")
    vault.refused(lambda: vault.prove(disk), name)


def test_a_killed_cryptsetup_is_told_by_its_signal(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """Such as by the kernel when memory ran out."""
    instead("kill -9 $$")
    assert "signal 9" in str(vault.refused(lambda: vault.prove(disk), "luks.cryptsetup").found)


def test_an_image_without_cryptsetup_is_an_error_of_the_image(
    disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """PATH is not asked, and a program that cannot run is none."""
    with pytest.raises(ImageError) as caught:
        vault.prove(disk)
    assert caught.value.code == "luks.no-cryptsetup"
    instead("").write_bytes(b"\x7fELF")
    with pytest.raises(ImageError) as caught:
        vault.prove(disk)
    assert caught.value.code == "luks.no-cryptsetup"
