"""A host that wants its owner's data rewritten: a reencryption that it has made up, or one that its machine cut off."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.installed import PASSPHRASE, opens, quiet

from kagimori_agent import device_lock, keyslots, reencrypt
from kagimori_agent.config import Volume
from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_protocol.luks2_layout import LuksHeader, build, copies
from kagimori_simulator import disk

pytestmark = pytest.mark.slow  # cryptsetup for each

AREA = 16 << 20
DATA = b"what only the owner reads".ljust(4096, b".")
Json = dict[str, Any]


def _header(image: Path) -> LuksHeader:
    with keyslots.opened(image) as one:
        found = [copy for copy in copies(one.read) if isinstance(copy, LuksHeader)]
    return max(found, key=lambda one: one.seqid)


def _write(image: Path, document: Json, newest: int = 1) -> None:
    """Put both copies of another header there, as anybody can who has the disk."""
    header = _header(image)
    raw = build(
        replace(header, json=document, seqid=header.seqid + newest, offset=0),
        (os.urandom(64), os.urandom(64)),
    )
    with image.open("r+b") as file:
        file.write(raw)


def _cryptsetup(*words: str, passphrase: bytes = PASSPHRASE) -> bytes:
    command = ["cryptsetup", *words]
    return subprocess.run(command, input=passphrase, capture_output=True, check=True).stdout


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Give a volume that its owner's passphrase opens, with something in it."""
    image = tmp_path / "volume.img"
    disk.make_volume(image, PASSPHRASE)
    with image.open("r+b") as file:
        file.seek(AREA)
        file.write(os.urandom(4096))  # what the disk holds of it: encrypted
    return image


@pytest.fixture
def planned(tmp_path: Path, volume: Path) -> Json:
    """Give what cryptsetup writes into a volume of the host's own, whose reencryption it has only begun."""
    image = tmp_path / "lab.img"
    disk.make_volume(image, b"the host's")
    words = (
        "reencrypt",
        "-q",
        "--init-only",
        "--force-offline-reencrypt",
        "--key-slot",
        "0",
        "--key-file",
        "-",
    )
    _cryptsetup(*words, "--resilience", "checksum", str(image), passphrase=b"the host's")
    document: Json = json.loads(json.dumps(_header(image).json))
    assert volume != image
    return document


def _grafted(volume: Path, plan: Json) -> Json:
    """Give the owner's header with the host's plan: its keyslot and its digest stay as they are."""
    document: Json = json.loads(json.dumps(_header(volume).json))
    document |= {"segments": plan["segments"], "config": plan["config"]}
    workers = {name: one for name, one in plan["keyslots"].items() if one["type"] == "reencrypt"}
    (worker,) = workers
    document["keyslots"] |= workers
    for member in ("segments", "keyslots"):
        document["digests"]["0"][member] = plan["digests"]["0"][member]
    document["digests"] |= {name: one for name, one in plan["digests"].items() if name != "0"}
    document["keyslots"] |= {
        name: one for name, one in plan["keyslots"].items() if name not in document["keyslots"]
    }
    assert worker in document["keyslots"]
    return document


def _to_clear(one: Json) -> None:
    for segment in one["segments"].values():
        if segment.get("flags") == ["backup-final"]:
            segment["encryption"] = "cipher_null-ecb"


def _plan_of(one: Json) -> Json:
    plan: Json = next(digest for digest in one["digests"].values() if not digest["segments"])
    return plan


def _fits_all(one: Json) -> None:
    _plan_of(one)["digest"] = ""


def _guessed(one: Json) -> None:
    _plan_of(one)["digest"] = base64.b64encode(os.urandom(32)).decode()


def _both(one: Json) -> None:
    _to_clear(one)
    _fits_all(one)


def _guessed_clear(one: Json) -> None:
    _to_clear(one)
    _guessed(one)


def _from_clear(one: Json) -> None:
    for name, segment in one["segments"].items():
        if name in one["digests"]["0"]["segments"]:
            segment["encryption"] = "cipher_null-ecb"


@pytest.mark.parametrize("forge", [_both, _to_clear, _fits_all, _guessed_clear, _from_clear])
def test_a_reencryption_that_the_host_has_made_up_is_refused_and_nothing_is_written(
    volume: Path, planned: Json, monkeypatch: pytest.MonkeyPatch, forge: Callable[[Json], None]
) -> None:
    """T1: it knows neither passphrase nor volume key, and would have the data rewritten in clear, or its own encrypted."""
    document = _grafted(volume, planned)
    forge(document)
    _write(volume, document)
    before = volume.read_bytes()
    monkeypatch.setattr(keyslots, "call", lambda *_, **__: pytest.fail("cryptsetup was started"))
    with pytest.raises(DiskError) as caught:
        _renew(volume)
    assert caught.value.code == "luks.under-way"
    assert volume.read_bytes() == before


def test_a_plan_of_the_right_form_whose_digest_the_host_cannot_know_is_refused_by_cryptsetup(
    volume: Path, planned: Json
) -> None:
    """The digest is over both volume keys; what is only lawful is not authentic yet."""
    document = _grafted(volume, planned)
    _guessed(document)
    _write(volume, document)
    before = volume.read_bytes()
    with pytest.raises(DiskError) as caught:
        _renew(volume)
    assert caught.value.code == "enrol.reencrypt"
    assert volume.read_bytes() == before


def test_a_null_cipher_over_data_of_the_hosts_is_refused_before_any_key_is_made(volume: Path) -> None:
    """T1: cryptsetup would encrypt what the host has put there in clear, and it would be enrolled."""
    document: Json = json.loads(json.dumps(_header(volume).json))
    document["segments"]["0"]["encryption"] = "cipher_null-ecb"
    _write(volume, document)
    with volume.open("r+b") as file:
        file.seek(AREA)
        file.write(DATA)
    before = volume.read_bytes()
    with pytest.raises(DiskError) as caught:
        _renew(volume)
    assert caught.value.code == "luks.cipher"
    assert volume.read_bytes() == before


def test_a_copy_of_the_hosts_that_the_judged_one_is_newer_than_is_written_over_first(
    volume: Path, tmp_path: Path, planned: Json
) -> None:
    """Cryptsetup reads a file itself: both copies say what was judged before it does."""
    document = _grafted(volume, planned)
    _both(document)
    raw = tmp_path / "forged.img"
    raw.write_bytes(volume.read_bytes())
    _write(raw, document, newest=0)
    size = _header(volume).size
    with volume.open("r+b") as file:
        file.seek(size)
        file.write(raw.read_bytes()[size : 2 * size])
    _renew(volume)
    assert opens(volume, PASSPHRASE)
    with keyslots.opened(volume) as one:
        assert one.load().whole == {0, size}


def _renew(volume: Path) -> dict[str, bytes]:
    uuid = _header(volume).uuid
    named = msgspec.convert({"uuid": uuid, "name": "volume"}, Volume)
    return reencrypt.renew([(named, volume)], lambda *_: PASSPHRASE, quiet)


def _killed_before_it_was_numbered(volume: Path) -> None:
    """Leave a header as cryptsetup does: its one digest has another number."""
    _renew(volume)
    document: Json = json.loads(json.dumps(_header(volume).json))
    document["digests"] = {"1": document["digests"]["0"]}
    _write(volume, document)


def test_a_run_that_was_killed_right_after_cryptsetup_is_mended_by_the_next(volume: Path) -> None:
    """The header has a digest of another number, which no agent allows."""
    _killed_before_it_was_numbered(volume)
    with keyslots.opened(volume) as one, pytest.raises(DiskError) as caught:
        one.load()
    assert caught.value.code == "luks.digests"
    assert len(_renew(volume)) == 1
    with keyslots.opened(volume) as one:
        one.load()


@pytest.mark.parametrize("broken", [0, 16384])
def test_a_header_is_numbered_whichever_copy_is_whole(volume: Path, broken: int) -> None:
    """The one that nobody can rely on is written first: cut off after it, the other still says what it said."""
    _killed_before_it_was_numbered(volume)
    with volume.open("r+b") as file:
        file.seek(broken)
        file.write(bytes(4096))
    written: list[int] = []
    real = keyslots.write

    def watched(file: int, offset: int, data: bytes) -> None:
        written.append(offset)
        real(file, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyslots, "write", watched)
        reencrypt.tidy(volume)
        reencrypt.tidy(volume)
    assert written == [broken, 16384 - broken]
    assert opens(volume, PASSPHRASE)


def test_a_header_that_is_not_allowed_gets_no_other_number(volume: Path) -> None:
    """What was never judged is not written anew with a right checksum."""
    _killed_before_it_was_numbered(volume)
    document: Json = json.loads(json.dumps(_header(volume).json))
    document["segments"]["0"]["encryption"] = "cipher_null-ecb"
    _write(volume, document)
    before = volume.read_bytes()
    with pytest.raises(DiskError) as caught:
        reencrypt.tidy(volume)
    assert caught.value.code == "luks.cipher"
    assert volume.read_bytes() == before


def test_udev_may_look_at_a_device_just_when_its_header_is_numbered(volume: Path) -> None:
    """It takes a lock for a moment whenever somebody has written to a whole disk."""
    _killed_before_it_was_numbered(volume)
    with volume.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.5, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        begun = time.monotonic()
        reencrypt.tidy(volume)
    assert time.monotonic() - begun < device_lock.WAIT_S
    assert list(_header(volume).json["digests"]) == ["0"]


def test_what_goes_on_is_not_said_to_have_a_new_key(volume: Path) -> None:
    """Its key is that of whoever had begun."""
    words = (
        "reencrypt",
        "-q",
        "--init-only",
        "--force-offline-reencrypt",
        "--key-slot",
        "0",
        "--key-file",
        "-",
    )
    _cryptsetup(*words, "--resilience", "checksum", str(volume))
    said: list[str] = []
    named = msgspec.convert({"uuid": _header(volume).uuid, "name": "volume"}, Volume)
    with pytest.raises(OperatorError) as caught:
        reencrypt.renew([(named, volume)], lambda *_: PASSPHRASE, said.append)
    assert caught.value.code == "enrol.resumed"
    assert said[-1].endswith("a reencryption that somebody had begun is ended")
    assert not any("has a new volume key" in line for line in said)
