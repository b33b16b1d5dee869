"""Volumes with integrity are enrolled by each of the three ways, and the next boot proves their keys (THREATS T21)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests import partitioned
from tests.desks import Desk
from tests.installed import PASSPHRASE, Installed, quiet, slots
from tests.partitioned import MIB
from tests.unit.luks import with_integrity

from kagimori_agent import cli, config, host_doors
from kagimori_agent.unlock import unlock
from kagimori_simulator import disk

pytestmark = pytest.mark.slow  # cryptsetup for each, and a swtpm and a server for some

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Give a volume with integrity."""
    image = tmp_path / "integrity.img"
    with_integrity.make(image, PASSPHRASE, UUID, disk.VOLUME_BYTES)
    return image


def piped(content: bytes) -> str:
    """Give a descriptor to read this from."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return str(reader)


def test_volume_add_enrols_a_volume_with_integrity(furnished: Desk, volume: Path) -> None:
    """On the owner's machine, which needs no device-mapper for it."""
    descriptor = piped(PASSPHRASE)
    done = furnished("volume", "add", "--vm", "web1", "--device", volume, "--passphrase-fd", descriptor)
    assert done.code == 0, done.err
    assert slots(volume) == ["1"]


def test_image_enrol_enrols_a_volume_with_integrity_beside_one_without(
    furnished: Desk, volume: Path, tmp_path: Path
) -> None:
    """Each as it was formatted."""
    plain = tmp_path / "plain.img"
    uuid = disk.make_volume(plain, PASSPHRASE)
    size = disk.VOLUME_BYTES
    image = tmp_path / "disk.raw"
    raw = bytearray(partitioned.gpt([(MIB, size), (MIB + size, size)], 3 * MIB + 2 * size))
    raw[MIB : MIB + 2 * size] = volume.read_bytes() + plain.read_bytes()
    image.write_bytes(raw)
    done = furnished(
        *("--json", "image", "enrol", image, "--vm", "web1", "--passphrase-fd", piped(PASSPHRASE + b"\n"))
    )
    assert done.code == 0, done.err
    assert [one["uuid"] for one in done.json["volumes"]] == [UUID, uuid]


def _with_integrity(installed: Installed) -> None:
    """Let the VM's second volume be one with integrity."""
    second = installed.volumes[1]
    with_integrity.make(second.device, PASSPHRASE, second.uuid, disk.VOLUME_BYTES)


def test_a_vm_enrols_one_with_and_one_without_integrity_and_opens_both(installed: Installed) -> None:
    """From the booted system, in one attestation; the next boot's keys are proved against both headers."""
    _with_integrity(installed)
    with installed.booted() as (_, toml):
        assert installed.enrol(toml, installed.code()).confirmed
    assert [slots(volume.device) for volume in installed.volumes] == [["1"], ["1"]]
    with installed.booted(*installed.volumes) as (_, toml):
        unlocked = unlock(config.load(toml), quiet, prove=True)
    assert [one.how for one in unlocked.volumes] == ["proved", "proved"]


def test_reencrypt_is_refused_for_all_volumes_where_one_has_integrity(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours into the first volume would be late to hear of the second; no code is spent, and no byte is changed."""
    _with_integrity(installed)
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    before = [volume.device.read_bytes() for volume in installed.volumes]
    code = installed.code()
    with installed.booted() as (_, toml):
        words = ["enrol", "--config", str(toml), "--reencrypt", "--code-fd", piped(code.text().encode())]
        words += ["--passphrase-fd", piped(PASSPHRASE + b"\n")]
        for volume in installed.volumes:
            words += ["--device", str(volume.device)]
        assert cli.main(words) == 8
        assert "cannot be reencrypted: it has integrity" in capsys.readouterr().err
        assert [volume.device.read_bytes() for volume in installed.volumes] == before
        assert installed.enrol(toml, code).confirmed, "the code is as good as it was"
