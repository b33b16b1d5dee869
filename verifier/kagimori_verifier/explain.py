"""What became of a session, for its owner: the decision, each check, and what to do about those that failed."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from kagimori_verifier import ledger
from kagimori_verifier.explanations import explanation
from kagimori_verifier.store import refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kagimori_verifier.ledger import Entry
    from kagimori_verifier.store import Txn

MAX_REFUSED: Final = 5
"""Refusals shown of one session; whoever knows its token can cause more."""
MAX_LINES: Final = 1000
"""Lines of the ledger looked at; an honest session has three."""

_CONFIRMED: Final = "confirmed-"
_MALFORMED: Final = {
    "about": "A message that could not be read.",
    "todo": "Agent and verifier must be of versions that fit.",
}
_NARROW: Final = 60
"""Columns that texts of a check get at least."""


def session(txn: Txn, name: str) -> dict[str, Any] | None:
    """Gather all that is known of a session, as ``explain --json`` prints it; None if nothing is."""
    entries = ledger.read(txn, session=name, limit=MAX_LINES)
    refused = [asdict(row) for row in refusals.newest(txn, MAX_REFUSED, session=name)]
    decided = next((entry for entry in reversed(entries) if "checks" in entry.body), None)
    if decided is None and not refused:
        return None
    shown: dict[str, Any] = {"session": name, "decision": None, "checks": [], "refused": refused}
    if decided is not None:
        body = dict(decided.body)
        shown["checks"] = body.pop("checks")
        shown["decision"] = _decision(decided, body, entries)
    failed = [check["id"] for check in shown["checks"] if not check["ok"]] + [row["code"] for row in refused]
    shown["failed"] = [{"id": check} | _meaning(check) for check in dict.fromkeys(failed)]
    return shown


def lines(shown: Mapping[str, Any], when: Callable[[int], str], width: int | None) -> list[str]:
    """Tell it to a person. ``when`` writes a time; ``width`` wraps texts for a terminal, None does not."""
    told = [_pair("session", shown["session"])]
    if decision := shown["decision"]:
        told += _told(decision, when)
    if shown["checks"]:
        told += ["", *_table(shown["checks"], width)]
    for row in shown["refused"]:
        told += ["", f"not believed: {row['path']} from {row['source']}, {when(row['created'])} UTC"]
        told += _table([row | {"id": row["code"], "ok": False}], width)
    for check in shown["failed"]:
        told += ["", f"{check['id']}: {check['about']}", f"  to do: {check['todo']}"]
    return told


def _decision(decided: Entry, body: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """Tell released, delivered and opened apart: only a Confirm tells what happened in the VM."""
    confirmed = [
        {"outcome": entry.event.removeprefix(_CONFIRMED), "created": entry.created}
        for entry in reversed(entries)
        if entry.event.startswith(_CONFIRMED)
    ]
    outcome = confirmed[-1]["outcome"] if confirmed else None
    return {
        "seq": decided.seq,
        "created": decided.created,
        "event": decided.event,
        "vm_id": decided.vm_id,
        "session": decided.session,
        "body": body,
        "hash": decided.hash.hex(),
        "outcome": outcome,
        "released": decided.event == "released",
        "delivered": True if confirmed else None,
        "opened": {"opened": True, "reencrypted": True, "failed": False}.get(str(outcome)),
        "confirmed": confirmed,
    }


def _told(decision: Mapping[str, Any], when: Callable[[int], str]) -> list[str]:
    body = decision["body"]
    told = [
        _pair("decision", f"{decision['event']}, {when(decision['created'])} UTC (line {decision['seq']})"),
        _pair("VM", decision["vm_id"]),
    ]
    told += [_pair(name, value) for name, value in body.items() if isinstance(value, str)]
    told += [_pair(name, ", ".join(value)) for name, value in body.items() if isinstance(value, list)]
    unlock = body.get("purpose") in {"unlock", "enrol"}
    if decision["released"]:
        told.append(_pair("released", "yes: its keys were sealed for this VM's agent and TPM"))
    else:
        told.append(_pair("released", "no" + ("" if unlock else f": {body.get('purpose')} asks for no keys")))
    told.append(
        _pair(
            "delivered",
            "yes: the VM's agent has opened the answer"
            if decision["delivered"]
            else "not known: no Confirm has arrived",
        )
    )
    if decision["released"]:
        opened = {
            True: "yes: the VM's agent has opened its volumes",
            False: "no: the VM's agent has the keys, but could not open its volumes",
            None: "not known: no Confirm says so",
        }
        told.append(_pair("opened", opened[decision["opened"]]))
    return told


def _pair(name: str, value: object) -> str:
    return f"{name:<16} {value}"


def _table(checks: Sequence[Mapping[str, Any]], width: int | None) -> list[str]:
    """Lay checks out: id, whether it holds, expected, found; texts are wrapped in their columns on a terminal."""
    longest = max(len("CHECK"), *(len(check["id"]) for check in checks))
    if width is None:
        rows = [
            [check["id"], _holds(check), f"expected: {check['expected']}", f"found: {check['found']}"]
            for check in checks
        ]
        return [f"{row[0]:<{longest}}  {row[1]}  {'  '.join(row[2:])}" for row in rows]
    column = max(_NARROW, width - longest - 11) // 2
    told = [f"{'CHECK':<{longest}}  {'':5}  {'EXPECTED':<{column}}  FOUND"]
    for check in checks:
        expected, found = (textwrap.wrap(check[name], column) or [""] for name in ("expected", "found"))
        for i in range(max(len(expected), len(found))):
            start = (check["id"], _holds(check)) if i == 0 else ("", "")
            cells = [texts[i] if i < len(texts) else "" for texts in (expected, found)]
            told.append(f"{start[0]:<{longest}}  {start[1]:<5}  {cells[0]:<{column}}  {cells[1]}".rstrip())
    return told


def _holds(check: Mapping[str, Any]) -> str:
    return "holds" if check["ok"] else "FAILS"


def _meaning(check: str) -> dict[str, str]:
    try:
        known = explanation(check)
    except KeyError:
        return dict(_MALFORMED)
    return {"about": known.about, "todo": known.todo}
