"""A recovery code is typed by hand on a bad day: what is wrong with it is found, and named by its place."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol import recovery_code
from kagimori_protocol.errors import UsageError

KEY = bytes(range(32))
CODE = recovery_code.encode(KEY)
ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"

keys = st.binary(min_size=32, max_size=32)


def bare(code: str) -> str:
    """Take the dashes away."""
    return code.replace("-", "")


def refused(text: str) -> UsageError:
    """Give the error of a code that must be refused."""
    with pytest.raises(UsageError) as caught:
        recovery_code.decode(text)
    return caught.value


def test_a_code_has_one_form() -> None:
    """Printed codes lie in drawers for years, so their form is pinned: Bech32m, part ``k``, groups of four."""
    assert CODE == "k1qq-qsyq-cyq5-rqwz-qfpg-9scr-gwpu-gpzy-snzs-23v9-ccry-dpk8-qarc-0svu-dqf6"
    assert len(bare(CODE)) == recovery_code.SIZE == 60
    assert [len(group) for group in CODE.split("-")] == [4] * 15


@given(keys)
def test_what_was_written_is_read(key: bytes) -> None:
    """In any case, with blanks, dashes and line breaks as people set them."""
    code = recovery_code.encode(key)
    for text in (code, bare(code), code.upper(), code.replace("-", " "), f"  {code[:30]}\n{code[30:]}\n"):
        assert recovery_code.decode(text) == key


@settings(max_examples=25)
@given(keys, st.integers(2, 59), st.sampled_from(ALPHABET))
def test_every_single_typo_is_caught_and_its_place_is_named(key: bytes, at: int, typed: str) -> None:
    """The owner hears which character of which group to look at."""
    code = bare(recovery_code.encode(key))
    if code[at] == typed:
        return
    error = refused(code[:at] + typed + code[at + 1 :])
    assert error.code == "recovery.checksum"
    assert error.found == f"a typo in character {at % 4 + 1} of group {at // 4 + 1}, if there is only one"


def test_every_single_typo_of_a_code_is_caught() -> None:
    """All 58 places and all 31 other characters: the checksum is linear, so what holds for one code holds for all."""
    code = bare(CODE)
    for at in range(2, 60):
        for typed in ALPHABET:
            if typed != code[at]:
                assert (
                    recovery_code._polymod(
                        [
                            *recovery_code._EXPANDED,
                            *[ALPHABET.index(one) for one in code[2:at] + typed + code[at + 1 :]],
                        ]
                    )
                    != recovery_code._BECH32M
                )


@settings(max_examples=25)
@given(keys, st.integers(2, 58))
def test_neighbours_that_changed_places_are_caught(key: bytes, at: int) -> None:
    """The commonest slip after a wrong letter."""
    code = bare(recovery_code.encode(key))
    if code[at] == code[at + 1]:
        return
    error = refused(code[:at] + code[at + 1] + code[at] + code[at + 2 :])
    assert (
        error.found
        == f"characters swapped at character {at % 4 + 1} of group {at // 4 + 1}, if nothing else is wrong"
    )


@given(keys, st.permutations(range(15)))
def test_groups_in_another_order_are_caught(key: bytes, order: list[int]) -> None:
    """Lines of a sheet of paper get mixed up, too; by chance one in a thousand million would pass."""
    groups = recovery_code.encode(key).split("-")
    mixed = [groups[index] for index in order]
    if mixed != groups:
        refused("-".join(mixed))


@given(st.text(max_size=80))
def test_any_text_is_refused_in_words(text: str) -> None:
    """A bad code is never a traceback."""
    with contextlib.suppress(UsageError):
        recovery_code.decode(text)


@pytest.mark.parametrize(
    ("text", "code", "found"),
    [
        ("", "recovery.length", "0"),
        (CODE[:-1], "recovery.length", "59, and group 15 has not 4"),
        (bare(CODE)[:-1], "recovery.length", "59"),
        (CODE.replace("-", "-q", 1), "recovery.length", "61, and group 2 has not 4"),
        ("i" + CODE[1:], "recovery.prefix", "another beginning"),
        (CODE[:7] + "b" + CODE[8:], "recovery.character", "character 3 of group 2"),
        (CODE[:7] + "İ" + CODE[8:], "recovery.character", "character 3 of group 2"),
        ("\N{KELVIN SIGN}" + CODE[1:], "recovery.prefix", "another beginning"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(text: str, code: str, found: str) -> None:
    """And no part of the key is quoted."""
    error = refused(text)
    assert (error.code, error.found) == (code, found)


def test_bits_that_belong_to_no_key_are_refused() -> None:
    """One key, one code."""
    values = [ALPHABET.index(one) for one in bare(CODE)[2:54]]
    values[-1] |= 1
    rest = recovery_code._polymod([*recovery_code._EXPANDED, *values, *[0] * 6]) ^ recovery_code._BECH32M
    values += [rest >> shift & 31 for shift in range(25, -1, -5)]
    assert refused("k1" + "".join(ALPHABET[value] for value in values)).code == "recovery.padding"


def test_the_checksum_is_bip_350s() -> None:
    """Its own example of the shortest string: A1LQFN3A, part ``a`` without data."""
    expanded = [ord("a") >> 5, 0, ord("a") & 31]
    assert (
        recovery_code._polymod([*expanded, *[ALPHABET.index(one) for one in "lqfn3a"]])
        == recovery_code._BECH32M
    )


def test_a_key_of_another_size_is_a_bug() -> None:
    """Nothing is padded or cut."""
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        recovery_code.encode(bytes(31))
