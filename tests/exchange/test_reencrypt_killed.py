"""A reencryption that is cut off before any of cryptsetup's writes is ended by the next run, and no byte of data is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from tests.installed import PASSPHRASE, opens, quiet

from kagimori_agent.reencrypt import end_begun
from kagimori_protocol.luks2_layout import LuksHeader, copies

pytestmark = pytest.mark.slow

FAST = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
SMALL = ("--luks2-metadata-size", "16k", "--luks2-keyslots-size", "1024k")
SIZE = 6 << 20
SECTOR = 4096
MOST_WRITES = 100


def _cryptsetup(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    command = [*before, "cryptsetup", *words]
    return subprocess.run(command, input=PASSPHRASE, check=False, capture_output=True, timeout=60)


def _deciphered(image: Path, encrypt: bytes | None = None) -> bytes:
    """Give the data of a volume by the volume key that its passphrase opens; or give what is to lie there for other data."""
    key_file = image.with_suffix(".key")
    key_file.unlink(missing_ok=True)
    words = ("--dump-volume-key", "--volume-key-file", str(key_file), "--key-file", "-", str(image))
    dumped = _cryptsetup("luksDump", "--batch-mode", *words)
    assert dumped.returncode == 0, dumped.stderr
    key = key_file.read_bytes()
    at = _data(image)
    data = encrypt if encrypt is not None else image.read_bytes()[at:]
    done = []
    for place in range(0, len(data), SECTOR):
        cipher = Cipher(AES(key), XTS((place // 512).to_bytes(16, "little")))
        one = cipher.encryptor() if encrypt is not None else cipher.decryptor()
        done.append(one.update(data[place : place + SECTOR]))
    return b"".join(done)


def _data(image: Path) -> int:
    raw = image.read_bytes()
    header = next(one for one in copies(lambda at, size: raw[at : at + size]) if isinstance(one, LuksHeader))
    return int(header.json["segments"]["0"]["offset"])


def test_the_next_run_ends_it_and_the_data_are_what_they_were(tmp_path: Path) -> None:
    """Among the last writes are states in which cryptsetup itself opens nothing, or would take all data for not written yet."""
    if shutil.which("strace") is None:
        explanation = "strace cuts cryptsetup off; install the package strace"
        if os.environ.get("CI") == "true":
            pytest.fail(explanation)
        pytest.skip(explanation)
    volume, image = tmp_path / "volume.img", tmp_path / "cut.img"
    volume.write_bytes(bytes(SIZE))
    made = _cryptsetup(
        "luksFormat",
        "--batch-mode",
        "--sector-size",
        str(SECTOR),
        *FAST,
        *SMALL,
        "--key-file",
        "-",
        str(volume),
    )
    assert made.returncode == 0, made.stderr
    room = SIZE - _data(volume)
    data = b"".join(b"the owner's sector %8d" % number + bytes(485) for number in range(room // 512))
    with volume.open("r+b") as file:
        file.seek(_data(volume))
        file.write(_deciphered(volume, encrypt=data[:room]))
    assert _deciphered(volume) == data[:room]

    ended = []
    for number in range(1, MOST_WRITES):
        shutil.copy(volume, image)
        if not _cut_off(image, number):
            break
        ended.append(end_begun(image, PASSPHRASE, quiet))
        assert opens(image, PASSPHRASE), number
        assert _deciphered(image) == data[:room], number
        assert not end_begun(image, PASSPHRASE, quiet), number
    assert len(ended) < MOST_WRITES - 1, "cryptsetup has come to its end"
    assert ended.count(True) > len(ended) // 3, json.dumps(ended)


def _cut_off(image: Path, number: int) -> bool:
    """Reencrypt a volume, and kill cryptsetup at its write of this number; tell whether it came to so many."""
    cut = ("strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=write")
    kill = ("-e", f"inject=write:signal=SIGKILL:when={number}")
    words = ("--batch-mode", "--resilience", "checksum", "--force-offline-reencrypt", *FAST)
    done = _cryptsetup("reencrypt", *words, "--key-file", "-", str(image), before=(*cut, *kill))
    return done.returncode != 0
