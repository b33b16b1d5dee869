"""What a dry-run keeps for its owner: what was sent, as it was sent, and the verdict; no part of it is secret.

Import budget: ``json`` and the messages' types.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kagimori_protocol import messages
from kagimori_protocol.errors import UsageError

if TYPE_CHECKING:
    from msgspec import UnsetType

    from kagimori_agent.attempt import Answered
    from kagimori_protocol.messages import Verdict


def make_directory(path: Path) -> None:
    """Make one that is not there yet, for root alone. Raises UsageError."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made.",
            code="save.directory",
            expected="a directory that does not exist yet",
            found=str(error.strerror),
        ) from error


def save(directory: Path, verdict: Verdict, answered: Answered) -> None:
    """Write down what was sent, as it was sent, and in parts that other tools read; no part of it is secret."""
    evidence = messages.decode(messages.Evidence, answered.evidence)
    parts: dict[str, bytes | UnsetType] = {
        "hello.json": answered.hello,
        "evidence.json": answered.evidence,
        "report.bin": evidence.report,
        "manifest.bin": evidence.manifest,
        "certificates.bin": evidence.certificates,
        "eventlog.bin": evidence.event_log,
    }
    if isinstance(evidence.quote, messages.Quote):
        parts |= {"quote.attest": evidence.quote.attest, "quote.signature": evidence.quote.signature}
    if isinstance(evidence.pcrs, list):
        values = {str(value.index): value.digest.hex() for value in evidence.pcrs}
        parts["pcrs.json"] = json.dumps({"sha256": values}, indent=2).encode()
    checks = [
        {"id": check.id, "ok": check.ok, "expected": check.expected, "found": check.found}
        for check in verdict.checks
    ]
    parts["verdict.json"] = json.dumps({"allowed": verdict.allowed, "checks": checks}, indent=2).encode()
    for name, content in parts.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
