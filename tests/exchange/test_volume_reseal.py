"""``volume reseal`` and ``volume add --recovery-code-fd`` on a disk that its host has had: they vouch for no header of the host's."""

from __future__ import annotations

from typing import Any

import pytest
from tests.exchange.test_volume_recovery import Shelf, by_pipe, shelf
from tests.unit.luks.attacker import Host
from tests.worlds import VM

__all__ = ["shelf"]

pytestmark = pytest.mark.slow  # cryptsetup's derivations


def reseal(shelf: Shelf, *more: str) -> tuple[str, ...]:
    """Give the verb."""
    return ("volume", "reseal", "--vm", VM, "--uuid", shelf.uuid, "--device", str(shelf.image), *more)


def other_sectors(document: Any) -> None:  # noqa: ANN401 - JSON
    """Lay the data out otherwise: what the MAC covers, and what opens without it."""
    segment = document["segments"]["0"]
    segment["sector_size"] = 512 if segment["sector_size"] == 4096 else 4096


def test_an_old_header_whose_token_the_host_has_torn_out_is_still_no_header_to_seal(shelf: Shelf) -> None:
    """Without a token there is no epoch that would tell its age, and the key's keyslot opens as it always did."""
    host = Host(shelf.image)
    old = host.kept()
    assert shelf.desk.good(*reseal(shelf))["header_epoch"] == 2
    host.write(0, old)
    host.forge(lambda document: document["tokens"].clear())
    before = shelf.image.read_bytes()
    assert shelf.desk("--json", *reseal(shelf)).error == "volume.unsealed"
    assert shelf.desk("--json", *reseal(shelf, "--restored")).error == "volume.unsealed"
    assert shelf.image.read_bytes() == before


def test_a_copy_that_the_host_forged_newer_than_the_owners_is_not_sealed(shelf: Shelf) -> None:
    """The volume boots by the other copy, so that nobody would notice before."""
    Host(shelf.image).forge(other_sectors, copies=(0,), newer=1)
    before = shelf.image.read_bytes()
    done = shelf.desk("--json", *reseal(shelf))
    assert done.error == "volume.unsealed"
    assert "--changed" in done.err
    assert shelf.image.read_bytes() == before


def test_a_header_that_the_owner_has_changed_is_sealed_at_his_word(shelf: Shelf) -> None:
    """Nothing else tells a change of the owner's from one of the host's; the ledger keeps the word."""
    Host(shelf.image).forge(other_sectors)
    assert shelf.desk.good(*reseal(shelf, "--changed"))["header_epoch"] == 2
    (line,) = shelf.desk.good("ledger", "list", "--limit", "1")
    assert line["body"] == {"uuid": shelf.uuid, "header_epoch": 2, "restored": False, "changed": True}


def test_a_code_from_paper_adds_no_key_to_a_header_that_it_does_not_vouch_for(shelf: Shelf) -> None:
    """Its own token stands in the header that the owner had; the host's newer copy opens by the code as well."""
    code = shelf.code()
    shelf.desk.good("volume", "remove", "--vm", VM, shelf.uuid)
    Host(shelf.image).forge(other_sectors, copies=(0,), newer=1)
    before = shelf.image.read_bytes()
    add = ("volume", "add", "--vm", VM, "--device", str(shelf.image))
    done = by_pipe(shelf.desk, code, "--recovery-code-fd", *add)
    assert done.error == "volume.unsealed"
    assert shelf.image.read_bytes() == before
    assert shelf.desk.good("volume", "list") == []


def test_a_volume_that_came_back_by_its_code_is_not_called_the_owners_own(shelf: Shelf) -> None:
    """The disk has been at its host; who formatted it, the code does not tell."""
    code = shelf.code()
    shelf.desk.good("volume", "remove", "--vm", VM, shelf.uuid)
    add = ("volume", "add", "--vm", VM, "--device", str(shelf.image))
    assert by_pipe(shelf.desk, code, "--recovery-code-fd", *add).code == 0
    (row,) = shelf.desk.good("volume", "list")
    assert row["provenance"] == "unknown"
