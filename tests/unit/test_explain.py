"""How ``explain`` tells a session: released, delivered and opened apart, in columns or in lines."""

from __future__ import annotations

import pytest

from kagimori_verifier import explain

CHECKS = [
    {"id": "report.tie", "ok": True, "expected": "a" * 130, "found": "so it is"},
    {"id": "pcr.9", "ok": False, "expected": "one kernel and its initramfs", "found": "another kernel"},
]


def _shown(event: str, outcome: str | None, opened: bool | None) -> dict[str, object]:
    decision = {
        "seq": 7,
        "created": 0,
        "event": event,
        "vm_id": "web1",
        "body": {"purpose": "unlock", "chip_id": "00ff"},
        "released": event == "released",
        "delivered": True if outcome else None,
        "opened": opened,
        "confirmed": [],
        "outcome": outcome,
    }
    return {"session": "5e55", "decision": decision, "checks": CHECKS, "refused": [], "failed": []}


@pytest.mark.parametrize(
    ("event", "outcome", "opened", "told"),
    [
        ("released", None, None, ["released yes", "delivered not known", "opened not known"]),
        ("released", "received", None, ["released yes", "delivered yes", "opened not known"]),
        ("released", "opened", True, ["released yes", "delivered yes", "opened yes"]),
        ("released", "failed", False, ["released yes", "delivered yes", "opened no"]),
        ("refused", "received", None, ["released no", "delivered yes"]),
    ],
)
def test_released_delivered_and_opened_are_told_apart(
    event: str, outcome: str | None, opened: bool | None, told: list[str]
) -> None:
    """A key that left is not one that arrived, and not a disk that is open."""
    lines = explain.lines(_shown(event, outcome, opened), str, None)
    facts = [" ".join(line.split()) for line in lines]
    for fact in told:
        assert any(line.startswith(fact) for line in facts), facts
    assert event == "released" or not any(line.startswith("opened") for line in facts)


def test_in_a_pipe_a_check_is_one_line_and_on_a_terminal_it_fits() -> None:
    """Programs that search lines find all of a check; people see columns."""
    shown = _shown("refused", None, None)
    piped = explain.lines(shown, str, None)
    assert any("pcr.9" in line and "FAILS" in line and "another kernel" in line for line in piped)
    narrow = explain.lines(shown, str, 80)
    assert all(len(line) <= 10 + len("report.tie") + 2 * 60 for line in narrow)
    assert sum(line.count("a" * 30) > 0 for line in narrow) > 1
