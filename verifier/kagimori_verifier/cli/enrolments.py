"""Verbs around an enrolment: a VM's one-time code, and what its owner decides about volumes that were enrolled by it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol import signature
from kagimori_protocol.errors import UsageError
from kagimori_verifier import enrolling, ledger
from kagimori_verifier.cli import arguments, recovery_paper
from kagimori_verifier.cli.access import now_s, opened, unknown, writing
from kagimori_verifier.cli.output import add_verb, when
from kagimori_verifier.states import STAGED, WAITING
from kagimori_verifier.store import enrolments, identities, vms

if TYPE_CHECKING:
    import argparse

    from kagimori_protocol.enrol_code import EnrolCode
    from kagimori_verifier.cli.output import Output, Verbs
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.enrolments import CodeRow
    from kagimori_verifier.store.vms import VolumeRow

_UNITS: Final = {"m": 60, "h": 3600, "d": 86_400}
_LONGEST_S: Final = 30 * 86_400
_TODO: Final = "`kagimori-verifier volume list` shows the volumes and their states."


def register_vm(verbs: Verbs) -> None:
    """Declare the verb of ``vm``."""
    code = add_verb(
        verbs,
        "code",
        _code,
        "Make a one-time code by which a booted VM may enrol volumes: `kagimori-agent enrol` asks for it there. It is good\n"
        "for one enrolment, replaces an earlier code of the VM, and holds the fingerprint of this verifier's key, so that\n"
        "the agent believes no other. It is shown once; what is kept of it makes no code and no proof.\n"
        "With --recovery a recovery code is shown, too, once: each volume that is enrolled by this code gets a keyslot for\n"
        "it. Write it down, and keep it where neither this verifier nor the VM's host is; never type it at the VM's console.",
        "vm code web1 --recovery",
    )
    code.add_argument("vm", type=arguments.vm, metavar="NAME")
    code.add_argument(
        "--expires",
        default="24h",
        type=_span,
        metavar="TIME",
        help="such as 30m, 24h or 7d (default: %(default)s)",
    )
    recovery_paper.declare(code)


def register_volume(verbs: Verbs) -> None:
    """Declare the verbs of ``volume``."""
    for name, run, about in (
        (
            "accept",
            _accept,
            (
                "Let a volume be unlocked that was enrolled by a boot which no reference value explains: its state is\n"
                "`waiting`. Whoever had booted something else in the VM then has the key of what it enrolled, so look first:\n"
                "`volume list --json` names the session, and `explain SESSION` shows what had booted."
            ),
        ),
        (
            "undo",
            _undo,
            (
                "Drop the key of an enrolment that nobody has confirmed, or that waits for you. The keyslot is removed in the\n"
                "VM: `kagimori-agent enrol --undo`."
            ),
        ),
    ):
        parser = add_verb(verbs, name, run, about, f"volume {name} --vm web1 0b5a0e3c-...")
        parser.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
        parser.add_argument("uuid", type=arguments.name, metavar="UUID")
    provenance = add_verb(
        verbs,
        "provenance",
        _provenance,
        "Say where a volume was formatted, if you know better: on the owner's machine, in this VM once it was attested, or\n"
        "anywhere (unknown). Whoever was there may know its volume key, and every verdict tells so.",
        "volume provenance --vm web1 0b5a0e3c-... unknown",
    )
    provenance.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    provenance.add_argument("uuid", type=arguments.name, metavar="UUID")
    provenance.add_argument("provenance", choices=enrolments.PROVENANCES)


def shown_code(txn: Txn, code: EnrolCode, row: CodeRow) -> dict[str, Any]:
    """Give what an operator takes to the VM."""
    keys = [key.public for key in identities.all(txn, "signing") if key.public is not None]
    named = next(signature.key_id(key) for key in keys if code.is_for(key))
    return {
        "code": code.text(),
        "verifier_key": named,
        "fingerprint": code.fingerprint.hex(),
        "expires": row.expires,
        "recovery": row.recovery is not None,
    }


def code_lines(vm_id: str, shown: dict[str, Any]) -> tuple[str, ...]:
    """Tell a code to a person."""
    keep = (
        "  keep the recovery code, with the UUIDs that it prints, where neither this verifier nor the VM's host is;",
        "  destroy it if the enrolment fails, or if you do not accept it: whatever had booted there may have that key",
    )
    return (
        f"code for {vm_id}: {shown['code']}",
        f"  good once, until {when(shown['expires'])} UTC; it names this verifier's key {shown['verifier_key']}",
        "  in the VM: kagimori-agent enrol --device PATH",
        *(keep if shown["recovery"] else ()),
    )


def provenance_of(txn: Txn, row: VolumeRow) -> dict[str, Any]:
    """Give how a volume came here."""
    found = [
        one for one in enrolments.of_vm(txn, row.vm_id) if (one.uuid, one.version) == (row.uuid, row.version)
    ]
    return {
        "provenance": found[0].provenance if found else "unknown",
        "session": found[0].session if found else None,
    }


def _code(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        recovery = recovery_paper.asked(options, output, settings, store)
        with store.write() as txn:
            if vms.get(txn, options.vm) is None:
                raise unknown("VM", options.vm, "`kagimori-verifier vm list` shows the VMs.")
            wrapped = None if recovery is None else recovery.wrapped_for(options.vm)
            code, row = enrolling.make_code(txn, options.vm, now_s(), options.expires, wrapped)
            shown = shown_code(txn, code, row)
    if recovery is not None:
        recovery_paper.show_new(recovery, options, options.vm)
    output.result({"vm_id": options.vm} | shown, *code_lines(options.vm, shown))
    return 0


def _accept(options: argparse.Namespace, output: Output) -> int:
    uuid = options.uuid.lower()
    with writing(options) as txn:
        rows = _rows(txn, options.vm, uuid)
        accepted = enrolling.accept(txn, rows, now_s(), None)
        if not accepted:
            raise unknown("waiting volume", uuid, _TODO)
    output.result({"accepted": uuid}, f"volume {uuid} of {options.vm} may be unlocked")
    return 0


def _undo(options: argparse.Namespace, output: Output) -> int:
    uuid = options.uuid.lower()
    with writing(options) as txn:
        rows = [one for one in _rows(txn, options.vm, uuid) if one.state in {STAGED, WAITING}]
        if not rows:
            raise unknown("enrolment to undo of volume", uuid, _TODO)
        for row in rows:
            enrolling.undo(txn, row, now_s())
    output.result(
        {"undone": uuid},
        f"dropped the key of {uuid}",
        "its keyslot is removed in the VM: kagimori-agent enrol --undo",
        "a recovery code that was made with its one-time code is to be destroyed: who enrolled it may have that key",
    )
    return 0


def _provenance(options: argparse.Namespace, output: Output) -> int:
    uuid = options.uuid.lower()
    with writing(options) as txn:
        _rows(txn, options.vm, uuid)
        for one in enrolments.of_vm(txn, options.vm):
            if one.uuid == uuid:
                enrolments.set_provenance(txn, one, options.provenance)
        body = {"uuid": uuid, "provenance": options.provenance}
        ledger.append(txn, at_s=now_s(), event="volume-provenance", vm_id=options.vm, session=None, body=body)
    output.result(body, f"volume {uuid}: {options.provenance}")
    return 0


def _rows(txn: Txn, vm_id: str, uuid: str) -> list[VolumeRow]:
    if vms.get(txn, vm_id) is None:
        raise unknown("VM", vm_id, "`kagimori-verifier vm list` shows the VMs.")
    rows = [one for one in vms.volumes(txn, vm_id, state=None) if one.uuid == uuid]
    if not rows:
        raise unknown("volume", uuid, _TODO)
    return rows


def _span(text: str) -> int:
    """Take a time span; gives seconds."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            "A time span has another form.",
            expected="a number of minutes, hours or days, such as 30m, 24h or 7d; at most 30 days",
            found=ascii(text[:40]),
        )
    return seconds
