"""What an argument may look like: each function takes a word of the command line and gives its value, or a UsageError.

What is typed here is shown on terminals, put into agent.toml and compared with what a guest says, so it is strict.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from kagimori_protocol.errors import UsageError
from kagimori_protocol.snp import CHIP_ID_SIZE, MEASUREMENT_SIZE, PLATFORM_INFO_BITS, POLICY_BITS
from kagimori_verifier.appraise.policy import TcbFloor

_VM: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LISTEN: Final = re.compile(r"(\[[0-9a-fA-F:]+\]|[0-9A-Za-z.-]+):([0-9]{1,5})")
_URL: Final = re.compile(r"https?://[!#-&(-;=@-\[\]-~]{1,500}")
_UNNAMED_BIT: Final = re.compile(r"bit [0-9]{1,2}")
MAX_LABEL: Final = 200
MAX_COMMAND_LINE: Final = 4096
MAX_PORT: Final = 65535
MAX_ROWS: Final = 1_000_000
SPKI_SIZE: Final = 32


def vm(text: str) -> str:
    """Take a VM's name, as PROTOCOL.md's vm_id."""
    return _matching(
        _VM,
        text,
        "A VM's name",
        "1 to 63 of a-z, 0-9, dot, dash, underscore, beginning with a letter or digit",
    )


def name(text: str) -> str:
    """Take the name of a profile, of a verifier, or of a mapping in /dev/mapper."""
    return _matching(
        _NAME,
        text,
        "A name",
        "1 to 64 of A-Z, a-z, 0-9, dot, dash, underscore, beginning with a letter or digit",
    )


def uuid(text: str) -> str:
    """Take a volume's UUID, in any case; agents ask by lower case."""
    return _matching(
        _UUID, text.lower(), "A volume's UUID", "8-4-4-4-12 hex digits, as `cryptsetup luksUUID` prints it"
    )


def label(text: str) -> str:
    """Take a text for people, on one line."""
    if not 1 <= len(text.strip()) <= MAX_LABEL or not text.isprintable():
        raise _other("A label", f"1 to {MAX_LABEL} printable characters", ascii(text[:80]))
    return text


def command_line(text: str) -> str:
    """Take a kernel command line."""
    if not 1 <= len(text) <= MAX_COMMAND_LINE or not text.isprintable():
        raise _other("A command line", f"1 to {MAX_COMMAND_LINE} printable characters", ascii(text[:80]))
    return text


def session(text: str) -> str:
    """Take the name of a session, as agents and the ledger print it, or of a check."""
    return _matching(
        re.compile(r"[a-z0-9.-]{1,64}"), text, "A session's name", "16 hex digits, as the agent prints them"
    )


def chip(text: str) -> str:
    """Take a CHIP_ID; all zero is what a host shows that masks its chip."""
    raw = _hex(text, CHIP_ID_SIZE, "A CHIP_ID", "vm.chip")
    if not any(raw):
        raise _other("A CHIP_ID", "the one in a report", "all zero: the host masks its chip", "vm.chip")
    return raw.hex()


def measurement(text: str) -> bytes:
    """Take a MEASUREMENT."""
    return _hex(text, MEASUREMENT_SIZE, "A measurement", "reference.digest")


def spki(text: str) -> bytes:
    """Take the pin of a root."""
    return _hex(text, SPKI_SIZE, "A root's pin", "root.pin")


def count(text: str) -> int:
    """Take how many rows to show."""
    return _number(text, 1, MAX_ROWS, "A limit")


def pcr(text: str) -> int:
    """Take the index of a PCR."""
    return _number(text, 0, 23, "A PCR")


def identifier(text: str) -> int:
    """Take the number that a list gave to a row."""
    return _number(text, 1, 1 << 62, "An ID")


def descriptor(text: str) -> int:
    """Take the number of an open file."""
    return _number(text, 0, 1 << 20, "A descriptor")


def listen(text: str) -> str:
    """Take an address to listen on; port 0 lets the system choose."""
    found = _LISTEN.fullmatch(text)
    if found is None or int(found[2]) > MAX_PORT:
        raise _other("An address", "HOST:PORT, as 127.0.0.1:8117 or [::1]:8117", ascii(text[:80]))
    return text


def url(text: str) -> str:
    """Take a URL that agents will take too: http or https, no user, password, query or fragment."""
    expected = "http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]"
    try:
        parts = urlsplit((_URL.fullmatch(text) and text) or "")
        sound = bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        sound = False
    if not sound or "#" in text:
        raise _other("A URL", expected, "something else")
    return text


def platform_flag(text: str) -> str:
    """Take the name of a PLATFORM_INFO bit."""
    return _flag(text, PLATFORM_INFO_BITS)


def guest_policy_flag(text: str) -> str:
    """Take the name of a guest policy bit."""
    return _flag(text, POLICY_BITS)


def tcb_floor(text: str) -> tuple[str, TcbFloor]:
    """Take ``PRODUCT:boot_loader=N,tee=N,snp=N,microcode=N`` (Turin: ``fmc=N`` too)."""
    product, _, rest = text.partition(":")
    parts = [part.partition("=") for part in rest.split(",")]
    numbers = {part: int(number) for part, _, number in parts if re.fullmatch(r"[0-9]{1,3}", number)}
    needed = {"boot_loader", "tee", "snp", "microcode"}
    if (
        len(numbers) != len(parts)
        or not needed <= set(numbers) <= needed | {"fmc"}
        or max(numbers.values()) > 255  # noqa: PLR2004 - one byte each
    ):
        raise _other(
            "A TCB floor",
            "PRODUCT:boot_loader=N,tee=N,snp=N,microcode=N (Turin: fmc=N, too), each up to 255",
            ascii(text[:120]),
            "policy.tcb-floor",
        )
    return product, TcbFloor(**numbers)


def _flag(text: str, names: dict[int, str]) -> str:
    if text not in names.values() and not _UNNAMED_BIT.fullmatch(text):
        raise _other(
            "A flag", f"{', '.join(names.values())}, or `bit N`", ascii(text[:80]), code="policy.flag"
        )
    return text


def _matching(pattern: re.Pattern[str], text: str, what: str, expected: str) -> str:
    if pattern.fullmatch(text) is None:
        raise _other(what, expected, ascii(text[:80]))
    return text


def _hex(text: str, size: int, what: str, code: str) -> bytes:
    if re.fullmatch(rf"[0-9a-fA-F]{{{2 * size}}}", text) is None:
        raise _other(what, f"{2 * size} hex digits", f"{len(text)} characters", code)
    return bytes.fromhex(text)


def _number(text: str, least: int, most: int, what: str) -> int:
    if re.fullmatch(r"[0-9]{1,19}", text) is None or not least <= int(text) <= most:
        raise _other(what, f"a number from {least} to {most}", ascii(text[:40]))
    return int(text)


def _other(what: str, expected: str, found: str, code: str = "usage") -> UsageError:
    return UsageError(f"{what} has another form.", code=code, expected=expected, found=found)
