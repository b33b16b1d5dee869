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
    with reading(options) as txn:
        entries = ledger.read(txn, session=options.what)
        redeemed = redemptions.by_session(txn, options.what)
        refused = refusals.newest(txn, 1, session=options.what)
    decided = next((entry for entry in entries if "checks" in entry.body), None)
    if decided is not None:
        outcome = None if redeemed is None else redeemed.outcome
        shown = _entry(decided) | {"checks": decided.body["checks"], "outcome": outcome}
        shown["body"] = {name: value for name, value in decided.body.items() if name != "checks"}
    elif refused:
        check = {
            "id": refused[0].code,
            "ok": False,
            "expected": refused[0].expected,
            "found": refused[0].found,
        }
        shown = asdict(refused[0]) | {"event": "not believed", "checks": [check], "outcome": None, "body": {}}
    else:
        raise unknown(
            "session",
            options.what,
            "`kagimori-verifier ledger list` and `ledger refusals` show the sessions.",
        )
    failed = [check | _meaning(check["id"]) for check in shown["checks"] if not check["ok"]]
    output.result(shown | {"failed": failed}, *_lines(shown, failed))
    return 0 if not failed else 1


def _lines(shown: dict[str, Any], failed: list[dict[str, Any]]) -> list[str]:
    lines = [f"{shown['event']}: VM {shown['vm_id'] or 'unknown'}, {when(shown['created'])} UTC"]
    lines += [f"{name}: {value}" for name, value in shown["body"].items() if isinstance(value, str)]
    if shown["body"]:
        lines.append(_DELIVERY[shown["outcome"]])
    for check in shown["checks"]:
        lines.append(f"{'holds' if check['ok'] else 'FAILS'}  {check['id']}")
        lines += _wrapped("expected", check["expected"]) + _wrapped("found", check["found"])
    for check in failed:
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
