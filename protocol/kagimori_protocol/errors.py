"""Every way Kagimori can fail, sorted by who must act.

::

    KagimoriError
    ├── Refused          the owner: the verifier judged authentic evidence and its policy said no        exit 1
    ├── UsageError       the caller: a command line or an argument that makes no sense                    exit 2
    ├── OperatorError    the operator: configuration, database, key file or reference value               exit 3
    ├── ImageError       who builds the guest image: a kernel option, driver, program or file is missing  exit 4
    ├── HardwareError    the machine below: report door, TPM, firmware, event log                         exit 5
    ├── NetworkError     nobody yet: no signed answer came, so wait and ask again                         exit 6
    ├── PeerError        the other side: bytes that the protocol does not allow                           exit 7
    │   ├── Malformed             they cannot be decoded strictly
    │   ├── UnsupportedVersion    they are of a version that this side does not speak
    │   └── NotAuthentic          a named check of PROTOCOL.md section 6 does not hold
    └── DiskError        the volume: its header, its keyslot, or cryptsetup                               exit 8

A message has up to four parts, each one sentence: what went wrong, what was expected, what was found, what to do
next. No part may ever carry a secret. Any other exception that leaves one of the rooms is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class KagimoriError(Exception):
    """Base of everything this project raises on purpose.

    ``code`` is kebab-case and stable: programs match it, texts may change.
    """

    exit_code: ClassVar[int] = 70
    default_code: ClassVar[str] = "error"

    def __init__(
        self,
        what: str,
        *,
        code: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        todo: str | None = None,
    ) -> None:
        """Keep the four parts; ``code`` narrows the class's own."""
        super().__init__(what)
        self.code = code or self.default_code
        self.what = what
        self.expected = expected
        self.found = found
        self.todo = todo

    def __str__(self) -> str:
        """Give all parts that are known, one a line, for a person."""
        parts = [self.what]
        if self.expected is not None:
            parts.append(f"expected: {self.expected}")
        if self.found is not None:
            parts.append(f"found: {self.found}")
        if self.todo is not None:
            parts.append(f"to do: {self.todo}")
        return "\n".join(parts)

    @property
    def reason(self) -> str:
        """Give code, expected and found in one line, or what went wrong where they are not known."""
        if self.expected is None or self.found is None:
            return f"{self.code}: {self.what}"
        return f"{self.code}: expected {self.expected}, found {self.found}"

    def as_dict(self) -> dict[str, str]:
        """Give all parts that are known, for ``--json``."""
        named = {
            "code": self.code,
            "what": self.what,
            "expected": self.expected,
            "found": self.found,
            "todo": self.todo,
        }
        return {name: text for name, text in named.items() if text is not None}


class Refused(KagimoriError):
    """The verifier judged authentic evidence, and its policy said no."""

    exit_code = 1
    default_code = "refused"


class UsageError(KagimoriError):
    """A command line or an argument makes no sense."""

    exit_code = 2
    default_code = "usage"


class OperatorError(KagimoriError):
    """Configuration, database, key file or reference value: the operator must act."""

    exit_code = 3
    default_code = "operator"


class ImageError(KagimoriError):
    """The guest image lacks a kernel option, a driver, a program or a file."""

    exit_code = 4
    default_code = "image"


class HardwareError(KagimoriError):
    """The machine below the guest: report door, TPM, firmware or event log."""

    exit_code = 5
    default_code = "hardware"


class NetworkError(KagimoriError):
    """No signed answer came. Only a signed reply is an answer; everything else is "away" and asked again."""

    exit_code = 6
    default_code = "verifier-away"


class PeerError(KagimoriError):
    """The other side sent bytes that the protocol does not allow."""

    exit_code = 7
    default_code = "peer"


class Malformed(PeerError):
    """Bytes cannot be decoded strictly."""

    default_code = "malformed"


class UnsupportedVersion(PeerError):
    """Bytes are of a version that this side does not speak."""

    default_code = "unsupported-version"


class NotAuthentic(PeerError):
    """A named check does not hold, so nothing that the evidence says may be believed. ``code`` is the check's id."""

    default_code = "not-authentic"


class DiskError(KagimoriError):
    """The volume: its header, its keyslot, or cryptsetup."""

    exit_code = 8
    default_code = "disk"
