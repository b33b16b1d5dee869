"""A recovery key as people write it down and type it: 32 bytes as 60 characters, in which a typo shows.

A code is a Bech32m string (BIP 350) whose human-readable part is ``k``: ``k1``, then 52 characters of key (256 bits and
four zero bits), then 6 of checksum, printed in 15 groups of four. Its alphabet has neither ``b``, ``i``, ``o`` nor a
second ``1``; case, blanks and dashes do not matter. The checksum finds every error in up to four characters, so every
single typo and every two characters that were swapped; of others it misses one in 2^30.

What is wrong is told by its place, never by what was typed or meant: a code is a key, and an error's text is not.
"""

from __future__ import annotations

from typing import Final

from kagimori_protocol.errors import UsageError

KEY_SIZE: Final = 32
PREFIX: Final = "k1"
GROUP: Final = 4
"""Characters of a printed group."""

_ALPHABET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"  # BIP 173
_VALUES: Final = {character: value for value, character in enumerate(_ALPHABET)}
_GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)  # BIP 173
_BECH32M: Final = 0x2BC830A3  # BIP 350
_EXPANDED: Final = (ord("k") >> 5, 0, ord("k") & 31)
"""The human-readable part as the checksum sees it (BIP 173)."""
_BITS: Final = 5
_DATA: Final = 52
_CHECKSUM: Final = 6
SIZE: Final = len(PREFIX) + _DATA + _CHECKSUM
"""Characters of a code, blanks and dashes aside."""
_PADDING: Final = _DATA * _BITS - KEY_SIZE * 8
_IGNORED: Final = frozenset(" -\t\r\n")


def encode(key: bytes) -> str:
    """Write a key of 32 bytes as a code, in groups. Raises ValueError for another size, which is a caller's bug."""
    if len(key) != KEY_SIZE:
        raise ValueError(f"a recovery key has {KEY_SIZE} bytes, not {len(key)}")
    number = int.from_bytes(key, "big") << _PADDING
    data = [number >> shift & 31 for shift in range((_DATA - 1) * _BITS, -1, -_BITS)]
    rest = _polymod([*_EXPANDED, *data, *[0] * _CHECKSUM]) ^ _BECH32M
    data += [rest >> shift & 31 for shift in range((_CHECKSUM - 1) * _BITS, -1, -_BITS)]
    text = PREFIX + "".join(_ALPHABET[value] for value in data)
    return "-".join(text[at : at + GROUP] for at in range(0, SIZE, GROUP))


def decode(text: str) -> bytes:
    """Read a code. Raises UsageError (``recovery.*``), which names the place of a typo and quotes nothing."""
    code = "".join(
        # Not ``lower`` alone: it makes an ASCII k of a Kelvin sign.
        character.lower() if character.isascii() else "?"
        for character in text
        if character not in _IGNORED
    )
    for at, character in enumerate(code):
        if character not in _VALUES and at >= len(PREFIX):
            raise _wrong("recovery.character", f"letters and digits of {_ALPHABET}", _place(at))
    if len(code) != SIZE:
        raise _wrong("recovery.length", f"{SIZE} characters", f"{len(code)}{_odd_group(text)}")
    if not code.startswith(PREFIX):
        raise _wrong("recovery.prefix", f"a code that begins with {PREFIX}", "another beginning")
    values = [_VALUES[character] for character in code[len(PREFIX) :]]
    if not _holds(values):
        raise _wrong("recovery.checksum", "a checksum that fits", _likely(values))
    number = 0
    for value in values[:_DATA]:
        number = number << _BITS | value
    if number & ((1 << _PADDING) - 1):
        raise _wrong("recovery.padding", "a code for 32 bytes", "one for something else")
    return (number >> _PADDING).to_bytes(KEY_SIZE, "big")


def _polymod(values: list[int]) -> int:
    """Divide by the code's generator (BIP 173)."""
    rest = 1
    for value in values:
        top = rest >> 25
        rest = (rest & 0x1FFFFFF) << _BITS ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                rest ^= generator
    return rest


def _holds(values: list[int]) -> bool:
    return _polymod([*_EXPANDED, *values]) == _BECH32M


def _likely(values: list[int]) -> str:
    """Name the place where one typo, or two neighbours that changed places, would explain it all.

    The code's distance is 5, so there is at most one such place; where more is wrong, it may be none of them.
    """
    for at, right in enumerate(values):
        tried = list(values)
        for value in range(32):
            tried[at] = value
            if value != right and _holds(tried):
                return f"a typo in {_place(at + len(PREFIX))}, if there is only one"
        if at and _holds([*values[: at - 1], right, values[at - 1], *values[at + 1 :]]):
            return f"characters swapped at {_place(at - 1 + len(PREFIX))}, if nothing else is wrong"
    return "typos in several places"


def _place(at: int) -> str:
    return f"character {at % GROUP + 1} of group {at // GROUP + 1}"


def _odd_group(text: str) -> str:
    """Name the first group that has not four characters, where groups were typed."""
    groups = text.replace("-", " ").split()
    odd = next((index for index, group in enumerate(groups, 1) if len(group) != GROUP), None)
    return "" if odd is None or len(groups) == 1 else f", and group {odd} has not {GROUP}"


def _wrong(code: str, expected: str, found: str) -> UsageError:
    return UsageError(
        "This is no recovery code.",
        code=code,
        expected=expected,
        found=found,
        todo="Compare it with what was written down, group by group.",
    )
