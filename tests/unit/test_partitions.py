"""Partition tables of images: what is there is read, and what is broken is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import partitioned
from tests.partitioned import MIB

from kagimori_protocol.errors import DiskError
from kagimori_verifier import partitions
from kagimori_verifier.partitions import Partition

SIZE = 16 * MIB
PARTS = [(MIB, 2 * MIB), (3 * MIB, 4 * MIB), (7 * MIB, 4 * MIB)]
FOUND = tuple(Partition(number, at, size) for number, (at, size) in enumerate(PARTS, 1))


def reading(raw: bytes) -> Callable[[int, int], bytes]:
    """Read from bytes."""
    return lambda offset, size: raw[offset : offset + size]


def refused(raw: bytes) -> str:
    """Find an image refused; gives the words."""
    with pytest.raises(DiskError) as caught:
        partitions.find(reading(raw), len(raw))
    assert caught.value.code == "image.partitions"
    return str(caught.value)


@pytest.mark.parametrize("sector", partitions.SECTORS)
def test_the_partitions_of_a_gpt_are_found_whatever_the_size_of_a_block(sector: int) -> None:
    """By number, offset and size in bytes."""
    raw = partitioned.gpt(PARTS, SIZE, sector)
    assert partitions.find(reading(raw), SIZE) == FOUND


def test_the_primary_partitions_of_an_mbr_are_found_and_an_image_without_a_table_has_none() -> None:
    """A volume may be the whole image."""
    assert partitions.find(reading(partitioned.mbr(PARTS, SIZE)), SIZE) == FOUND
    assert partitions.find(reading(bytes(SIZE)), SIZE) == ()
    assert partitions.find(reading(b""), 0) == ()


@pytest.mark.parametrize("at", [512 + 24, 512 + 72, 1024 + 32, 1024 + 128 + 40])
def test_a_table_that_was_changed_is_refused(at: int) -> None:
    """Its checksums say so."""
    raw = bytearray(partitioned.gpt(PARTS, SIZE))
    raw[at] ^= 1
    refused(bytes(raw))


@pytest.mark.parametrize(
    "parts",
    [[(MIB, 2 * MIB), (2 * MIB, 2 * MIB)], [(8 * MIB, 16 * MIB)], [(0, MIB)]],
    ids=["upon one another", "beyond the image", "upon the table"],
)
def test_partitions_lie_beside_one_another_within_the_image(parts: list[tuple[int, int]]) -> None:
    """What is written to one would be another's."""
    refused(partitioned.gpt(parts, SIZE))
    refused(partitioned.mbr(parts, SIZE))


def test_an_mbr_that_speaks_of_a_gpt_or_of_more_is_refused() -> None:
    """A protective MBR without its GPT; an extended partition."""
    raw = bytearray(partitioned.gpt(PARTS, SIZE))
    raw[512:520] = bytes(8)
    assert "GPT" in refused(bytes(raw))
    assert "extended" in refused(partitioned.mbr(PARTS, SIZE, kind=0x05))


@given(st.binary(max_size=700), st.binary(max_size=300))
def test_any_bytes_are_a_table_or_refused(first: bytes, second: bytes) -> None:
    """Never a traceback."""
    raw = first[:510].ljust(510, b"\0") + b"\x55\xaa" + b"EFI PART" + second
    for one in (raw, first):
        try:
            found = partitions.find(reading(one), len(one))
        except DiskError:
            continue
        assert all(partition.offset + partition.size <= len(one) for partition in found)
