"""``image enrol`` as an owner runs it: a partitioned image with real LUKS2 volumes, and what is in it afterwards."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from tests import partitioned
from tests.desks import Desk, Done
from tests.partitioned import MIB

from kagimori_protocol import luks2_guard
from kagimori_simulator import disk
from kagimori_verifier import luks_enrol, settings
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import enrolments, vms

pytestmark = pytest.mark.slow  # cryptsetup, for each volume

PASSPHRASE = b"the passphrase of an installer"
VOLUME = disk.VOLUME_BYTES
PARTS = [(MIB, MIB), (2 * MIB, VOLUME), (2 * MIB + VOLUME, VOLUME)]
SIZE = 4 * MIB + 2 * VOLUME


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, list[str]]:
    """Give an image with an ESP and two volumes, and their UUIDs."""
    raw = bytearray(partitioned.gpt(PARTS, SIZE))
    uuids = []
    for at, size in PARTS[1:]:
        part = tmp_path / "part"
        uuids.append(disk.make_volume(part, PASSPHRASE))
        raw[at : at + size] = part.read_bytes()
        part.unlink()
    path = tmp_path / "disk.raw"
    path.write_bytes(raw)
    return path, uuids


def enrolled(desk: Desk, path: Path, *words: str | Path) -> Done:
    """Enrol an image, with the passphrase on a pipe."""
    reader, writer = os.pipe()
    os.write(writer, PASSPHRASE + b"\n")
    os.close(writer)
    try:
        return desk("--json", "image", "enrol", path, "--vm", "web1", "--passphrase-fd", str(reader), *words)
    finally:
        os.close(reader)


def test_every_volume_of_an_image_gets_a_keyslot_and_everything_else_stays(
    furnished: Desk, image: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Headers are sealed within the image; agent.toml names the volumes; no host has known their keys."""
    path, uuids = image
    before = path.read_bytes()
    done = enrolled(furnished, path, "--agent-toml", tmp_path / "agent.toml")
    assert done.code == 0, done.err
    assert [(one["partition"], one["uuid"]) for one in done.json["volumes"]] == [(2, uuids[0]), (3, uuids[1])]
    told = tomllib.loads((tmp_path / "agent.toml").read_text())
    assert {one["uuid"]: one["name"] for one in told["volumes"]} == {
        uuids[0]: "cryptroot",
        uuids[1]: f"luks-{uuids[1]}",
    }
    after = path.read_bytes()
    kek = UnlockKeys(settings.load(furnished.config).kek_provider().read())
    store = furnished.store()
    with store.read() as txn:
        rows = sorted(vms.volumes(txn, "web1"), key=lambda row: uuids.index(row.uuid))
        assert {one.provenance for one in enrolments.of_vm(txn, "web1")} == {"owner-machine"}
    store.close()
    for row, (at, size) in zip(rows, PARTS[1:], strict=True):
        key = kek.unwrap(row.wrapped, "web1", row.uuid, row.version)
        with luks_enrol.opened(path, (at, size)) as part:
            assert luks2_guard.choose(part.read, part.size, row.uuid, key, 1).slot == "1"
        data = at + (16 << 20)
        assert after[data : at + size] == before[data : at + size]
    assert after[: PARTS[1][0]] == before[: PARTS[1][0]]


def test_one_partition_can_be_named_and_an_image_may_be_one_volume(
    furnished: Desk, image: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Or none at all, which is said."""
    path, uuids = image
    done = enrolled(furnished, path, "--partition", "3", "--name", "data")
    assert [(one["uuid"], one["label"]) for one in done.json["volumes"]] == [(uuids[1], "data")]
    whole = tmp_path / "whole.raw"
    uuid = disk.make_volume(whole, PASSPHRASE)
    assert [one["uuid"] for one in enrolled(furnished, whole).json["volumes"]] == [uuid]
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(MIB))
    assert enrolled(furnished, empty).error == "image.luks2"
    assert enrolled(furnished, path, "--partition", "9").error == "usage"
