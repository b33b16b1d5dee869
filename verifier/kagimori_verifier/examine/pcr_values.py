"""PCR values that somebody read from a TPM, as a JSON file.

Either by bank, ``{"sha256": {"0": "<hex>", ...}, ...}``, or of one bank, ``{"0": "<hex>", ...}``, which the length
of the digests tells. Names of banks may be written as ``SHA256`` or ``sha-256``, too.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import Malformed
from kagimori_verifier.verify.eventlog_layout import DIGEST_SIZES, PCR_COUNT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Banks = Mapping[str, Mapping[int, bytes]]

MAX_SIZE: Final = 1 << 20
"""Bytes; 24 PCRs of four banks take 8 KiB."""

_BY_SIZE: Final = {size: bank for bank, size in DIGEST_SIZES.items()}
_INDEX: Final = re.compile(r"0|[1-9][0-9]?")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_FORM: Final = '{"sha256": {"0": "<hex>", ...}, ...}, or {"0": "<hex>", ...} of one bank'


def parse(raw: bytes) -> Banks:
    """Read the values by bank and index. Raises Malformed (pcrs.layout), also where there is no value at all."""
    try:
        found = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _other("JSON", str(error) or type(error).__name__) from None
    if not isinstance(found, dict):
        raise _other(_FORM, f"{type(found).__name__}")
    if all(_INDEX.fullmatch(key) for key in found):
        found = {_bank_of(found): found} if found else {}
    banks = {_bank(name): values for name, values in found.items()}
    if len(banks) != len(found):
        raise _other("each bank once", ", ".join(found))
    read = {bank: _values(bank, values) for bank, values in banks.items()}
    if not any(read.values()):
        raise _other("at least one PCR's value", "none")
    return {bank: values for bank, values in read.items() if values}


def numbers(pcrs: Iterable[int]) -> str:
    """Write PCRs for a person: ``0 to 7, 14``."""
    runs: list[list[int]] = []
    for pcr in sorted(pcrs):
        if runs and pcr == runs[-1][-1] + 1:
            runs[-1].append(pcr)
        else:
            runs.append([pcr])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def _values(bank: str, values: object) -> dict[int, bytes]:
    if not isinstance(values, dict):
        raise _other(f"the {bank} bank as an object of PCRs", type(values).__name__)
    return {_pcr(index): _digest(bank, index, digest) for index, digest in values.items()}


def _pcr(text: str) -> int:
    if _INDEX.fullmatch(text) is None or int(text) >= PCR_COUNT:
        raise _other(f"a PCR's index from 0 to {PCR_COUNT - 1}", ascii(text[:40]))
    return int(text)


def _digest(bank: str, index: str, digest: object) -> bytes:
    size = DIGEST_SIZES[bank]
    if not isinstance(digest, str) or _HEX.fullmatch(digest) is None or len(digest) != 2 * size:
        what = f"{len(digest)} characters" if isinstance(digest, str) else type(digest).__name__
        raise _other(f"{2 * size} hex digits for PCR {index} of {bank}", what)
    return bytes.fromhex(digest)


def _bank_of(values: Mapping[str, object]) -> str:
    """Tell by their lengths which bank values are of; one length, or they are of none."""
    sizes = {len(value) // 2 if isinstance(value, str) else 0 for value in values.values()}
    if len(sizes) != 1 or (size := sizes.pop()) not in _BY_SIZE:
        raise _other("digests of one bank, in hex", "digests of several or unknown lengths")
    return _BY_SIZE[size]


def _bank(name: str) -> str:
    bank = name.lower().replace("-", "")
    if bank not in DIGEST_SIZES:
        raise _other(f"banks among {', '.join(DIGEST_SIZES)}", ascii(name[:40]))
    return bank


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice: whichever counted, the other would have been shown to somebody."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that comes twice")
    return found


def _other(expected: str, found: str) -> Malformed:
    return Malformed(
        "PCR values cannot be read.",
        code="pcrs.layout",
        expected=expected,
        found=found,
        todo=f"Write them as {_FORM}.",
    )
