"""``ledger`` and ``explain``: what was decided, and why."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kagimori_verifier import explain, ledger
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import reading, unknown
from kagimori_verifier.cli.output import Output, add_verb, group, when
from kagimori_verifier.explanations import explanation
from kagimori_verifier.store import refusals

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.ledger import Entry


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    records = group(
        add_verb(
            verbs,
            "ledger",
            None,
            "Read every decision, in order, each line bound to the one before it.",
            "ledger list",
        )
    )
    for name, run, about in (
        ("list", _list, "List the newest lines of the ledger."),
        ("refusals", _refusals, "List the newest requests that were refused before they were believed."),
    ):
        parser = add_verb(records, name, run, about, f"ledger {name} --vm web1")
        parser.add_argument("--vm", type=arguments.vm, metavar="NAME", help="only of this VM")
        parser.add_argument(
            "--session", type=arguments.session, metavar="SESSION", help="only of this session"
        )
        parser.add_argument(
            "--limit",
            type=arguments.count,
            default=20,
            metavar="N",
            help="how many (default: %(default)s)",
        )
    add_verb(records, "verify", _verify, "Walk the whole chain and print its head.", "ledger verify")
    told = add_verb(
        verbs,
        "explain",
        _explain,
        "Explain what became of a session, or what a check is about. Exit code 1 if a check of the session failed.",
        "explain 1f2e3d4c5b6a7988",
    )
    told.add_argument("what", type=arguments.session, metavar="SESSION|CHECK")


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        entries = ledger.read(txn, vm_id=options.vm, session=options.session, limit=options.limit)
    rows = [_entry(entry) for entry in entries]
    if not output.as_json:
        rows = [row | {"created": when(row["created"])} for row in rows]
    output.rows(rows, "seq", "created", "event", "vm_id", "session", none="no lines")
    return 0


def _refusals(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        found = refusals.newest(txn, options.limit, vm_id=options.vm, session=options.session)
    rows: list[dict[str, Any]] = [asdict(row) for row in found]
    if not output.as_json:
        rows = [row | {"created": when(row["created"])} for row in rows]
    output.rows(rows, "created", "vm_id", "session", "code", "found", "source", none="no refusals")
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
        shown = explain.session(txn, options.what)
    if shown is None:
        raise unknown(
            "session",
            options.what,
            "`kagimori-verifier ledger list` and `ledger refusals` show the sessions.",
        )
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output.result(shown, *explain.lines(shown, when, width))
    return 1 if shown["failed"] else 0


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
