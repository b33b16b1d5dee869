"""A boot is its REPORT_ID: whatever else a report says of it may change while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kagimori_verifier.store import Store, redemptions

CHIP, MASKED = b"\x11" * 64, bytes(64)
REPORT_ID, OTHER = b"\x22" * 32, b"\x33" * 32
FIRST, SECOND = b"\x01" * 32, b"\x02" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give an empty database."""
    made = Store.create(f"sqlite:///{tmp_path / 'verifier.db'}")
    yield made
    made.close()


@pytest.mark.parametrize(("signer", "chip"), [("vlek", CHIP), ("vlek", MASKED), ("vcek", MASKED)])
def test_a_boot_that_had_its_one_answer_gets_none_under_another_signer_or_a_masked_chip(
    store: Store, signer: str, chip: bytes
) -> None:
    """A guest chooses who signs (MSG_REPORT_REQ.KEY_SEL), and its host whether CHIP_ID shows."""
    with store.write() as txn:
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, FIRST)
        assert not redemptions.claim_direct_grant(txn, signer, chip, REPORT_ID, SECOND)
        assert redemptions.claim_direct_grant(txn, signer, chip, OTHER, SECOND)


def test_the_session_that_has_the_one_answer_of_a_boot_keeps_it(store: Store) -> None:
    """An answer that was lost on the way is made again."""
    with store.write() as txn:
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, FIRST)
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, FIRST)


def test_a_boot_that_was_opened_stays_opened_whoever_signs_next(store: Store) -> None:
    """Marked under one signer, it shows under every other."""
    with store.write() as txn:
        assert not redemptions.is_opened(txn, REPORT_ID)
        redemptions.mark_opened(txn, "vcek", CHIP, REPORT_ID, FIRST)
        redemptions.mark_opened(txn, "vlek", MASKED, REPORT_ID, SECOND)
        assert redemptions.is_opened(txn, REPORT_ID)
        assert not redemptions.is_opened(txn, OTHER)
