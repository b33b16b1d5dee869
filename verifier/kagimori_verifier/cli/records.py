"""``ledger`` and ``explain``: what was decided, and why."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from kagimori_verifier import ledger
from kagimori_verifier.cli.output import Output, add_verb, group, reading, unknown, when
from kagimori_verifier.explanations import explanation
from kagimori_verifier.store import redemptions, refusals

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.ledger import Entry

_DELIVERY: Final = {
    None: "no Confirm has arrived: whether the VM has the answer is not known",
    "received": "the VM's agent has opened the answer",
    "opened": "the VM's agent has opened its volumes",
    "failed": "the VM's agent has the answer, but could not open its volumes",
}
MAX_REFUSED: Final = 5
"""Refusals shown of one session; whoever knows its token can cause more."""

_WIDTH: Final = 100


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    records = group(
        add_verb(verbs, "ledger", None, "Every decision, in order, each line bound to the one before it.")
    )
    for name, run, about in (
        ("list", _list, "List the newest lines of the ledger."),
        ("refusals", _refusals, "List the newest requests that were refused before they were believed."),
    ):
        parser = add_verb(records, name, run, about, f"ledger {name} --vm web1")
        parser.add_argument("--vm", metavar="NAME")
        parser.add_argument("--session", metavar="SESSION")
        parser.add_argument(
            "--limit", type=int, default=20, metavar="N", help="how many (default: %(default)s)"
        )
    add_verb(records, "verify", _verify, "Walk the whole chain and print its head.", "ledger verify")
    explain = add_verb(
        verbs, "explain", _explain, "Explain a session's decision, or a check.", "explain 1f2e3d4c5b6a7988"
    )
    explain.add_argument("what", metavar="SESSION|CHECK")


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        entries = ledger.read(txn, vm_id=options.vm, session=options.session, limit=options.limit)
    rows = [_entry(entry) for entry in entries]
    short = rows if output.as_json else [row | {"created": when(row["created"])} for row in rows]
    output.rows(short, "seq", "created", "event", "vm_id", "session", none="no lines")
    return 0


def _refusals(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [
            asdict(row)
            for row in refusals.newest(txn, options.limit, vm_id=options.vm, session=options.session)
        ]
    short = rows if output.as_json else [row | {"created": when(row["created"])} for row in rows]
    output.rows(short, "created", "vm_id", "session", "code", "found", "source", none="no refusals")
    return 0


def _verify(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        count, head = ledger.verify(txn)
    output.result({"verified": True, "lines": count, "head": head.hex()}, f"{count} lines, head {head.hex()}")
    return 0


def _explain(options: argparse.Namespace, output: Output) -> int:
    try:
        known = explanation(options.what)
    except KeyError:
        return _explain_session(options, output)
    output.result(
        {"check": options.what, "step": known.step, "about": known.about, "todo": known.todo},
        f"{options.what} (step {known.step}): {known.about}",
        f"when it fails: {known.todo}",
    )
    return 0


def _explain_session(options: argparse.Namespace, output: Output) -> int:
    """Tell the decision about a session, and what else was sent under its name and not believed."""
    with reading(options) as txn:
        entries = ledger.read(txn, session=options.what)
        redeemed = redemptions.by_session(txn, options.what)
        refused = refusals.newest(txn, MAX_REFUSED, session=options.what)
    decided = next((entry for entry in entries if "checks" in entry.body), None)
    if decided is None and not refused:
        todo = "`kagimori-verifier ledger list` and `ledger refusals` show the sessions."
        raise unknown("session", options.what, todo)
    shown: dict[str, Any] = {"session": options.what, "decision": None, "checks": [], "refused": []}
    if decided is not None:
        shown["decision"] = _entry(decided) | {"outcome": None if redeemed is None else redeemed.outcome}
        shown["checks"] = shown["decision"]["body"].pop("checks")
    shown["refused"] = [asdict(row) for row in refused]
    failed = [check["id"] for check in shown["checks"] if not check["ok"]] + [row.code for row in refused]
    shown["failed"] = [{"id": check} | _meaning(check) for check in dict.fromkeys(failed)]
    output.result(shown, *_lines(shown))
    return 1 if failed else 0


def _lines(shown: dict[str, Any]) -> list[str]:
    lines = []
    if decision := shown["decision"]:
        lines.append(f"{decision['event']}: VM {decision['vm_id']}, {when(decision['created'])} UTC")
        lines += [f"{name}: {value}" for name, value in decision["body"].items() if isinstance(value, str)]
        lines += [_DELIVERY[decision["outcome"]], ""]
    for check in shown["checks"]:
        lines.append(f"{'holds' if check['ok'] else 'FAILS'}  {check['id']}")
        lines += _wrapped("expected", check["expected"]) + _wrapped("found", check["found"])
    for row in shown["refused"]:
        lines.append(f"not believed: {row['path']} from {row['source']}, {when(row['created'])} UTC")
        lines.append(f"FAILS  {row['code']}")
        lines += _wrapped("expected", row["expected"]) + _wrapped("found", row["found"])
    for check in shown["failed"]:
        lines += ["", f"{check['id']}: {check['about']}", f"  to do: {check['todo']}"]
    return lines


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}", _WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 9)


def _meaning(check: str) -> dict[str, str]:
    try:
        known = explanation(check)
    except KeyError:
        return {
            "about": "A message that could not be read.",
            "todo": "Agent and verifier must be of versions that fit.",
        }
    return {"about": known.about, "todo": known.todo}


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "created": entry.created,
        "event": entry.event,
        "vm_id": entry.vm_id,
        "session": entry.session,
        "body": entry.body,
        "hash": entry.hash.hex(),
    }
