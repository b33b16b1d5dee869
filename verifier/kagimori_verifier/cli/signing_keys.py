"""``identity``: the keys that sign this verifier's answers, and how one follows another."""

from __future__ import annotations

import argparse
import re
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import UsageError
from kagimori_verifier import rotation
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import now_s, opened, reading, writing
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.store import identities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.rotation import Pinned
    from kagimori_verifier.store import Txn

_ORDER: Final = ("current", "next", "previous", "retired")


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    identity = group(
        add_verb(
            verbs,
            "identity",
            None,
            "Show or change the keys that sign this verifier's answers, which agents pin.",
            "identity show",
        )
    )
    add_verb(
        identity,
        "show",
        _show,
        "Print the public keys that agents pin and, while they change, which VMs are not known to pin the next one.",
        "identity show",
    )
    add_verb(
        identity,
        "rotate",
        _rotate,
        "Stage the next key: `vm config` has it from now on. It signs answers to agents that pin it, and to no others.",
        "identity rotate",
    )
    activate = add_verb(
        identity,
        "activate",
        _activate,
        "Make the next key the current one. The one before still answers agents that pin nothing newer.\n"
        "Refused while a VM's newest boot has not shown that it pins the next key.",
        "identity activate",
    )
    retire = add_verb(
        identity,
        "retire",
        _retire,
        "Answer by a previous key no more, or give up a next one. Refused while a VM may pin no other.",
        "identity retire 0123456789abcdef",
    )
    retire.add_argument("key_id", type=_key_id, metavar="KEY_ID", help="as `identity show` prints it")
    for parser in (activate, retire):
        parser.add_argument(
            "--without",
            action="append",
            default=[],
            type=arguments.vm,
            metavar="VM",
            help="do it although this VM is not known to pin a remaining key, and may get no key any more; repeatable",
        )


def _show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        shown = _shown(txn)
    rows = shown["keys"]
    lines = [f"{row['state']}  {row['key_id']}  {row['public_key']}" for row in rows]
    current: dict[str, Any] = next((row for row in rows if row["state"] == "current"), {})
    output.result(
        {
            "key_id": current.get("key_id"),
            "public_key": current.get("public_key"),
            "state": current.get("state"),
        }
        | shown,
        *lines,
        *_lacking_lines(shown),
    )
    return 0


def _rotate(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        kek = own_kek(settings, store)
        with store.write() as txn:
            made = rotation.stage(txn, kek, now_s())
        with store.read() as txn:
            shown = _shown(txn)
    output.result(
        {"staged": made.key_id} | shown,
        f"staged {made.key_id}: it is in what `vm config` prints, and answers agents that pin it",
        "next: kagimori-verifier backup FILE, since no backup has this key yet",
        "then give each VM its new agent.toml, rebuild its initramfs, boot it, and look at `identity show`",
        *_lacking_lines(shown),
    )
    return 0


def _activate(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        row = rotation.activate(txn, now_s(), options.without)
        shown = _shown(txn)
    previous = [key["key_id"] for key in shown["keys"] if key["state"] == "previous"]
    output.result(
        {"activated": row.key_id} | shown,
        f"{row.key_id} is the current key",
        *(f"next: kagimori-verifier identity retire {key_id}" for key_id in previous),
    )
    return 0


def _retire(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        rotation.retire(txn, options.key_id, now_s(), options.without)
        shown = _shown(txn)
    output.result({"retired": options.key_id} | shown, f"{options.key_id} answers nobody any more")
    return 0


def _shown(txn: Txn) -> dict[str, Any]:
    """Give the keys, and the VMs that are not known to pin the next one, or else the current one."""
    keys = sorted(identities.all(txn, "signing"), key=lambda row: _ORDER.index(row.state))
    newest = [row for row in keys if row.state == "next"] or [row for row in keys if row.state == "current"]
    missing: Sequence[Pinned] = rotation.lacking(txn, newest) if newest else ()
    return {
        "keys": [
            {
                "key_id": row.key_id,
                "public_key": b64encode(row.public).decode(),
                "state": row.state,
                "created": row.created,
            }
            for row in keys
            if row.public is not None
        ],
        "newest": newest[0].key_id if newest else None,
        "lacking": [{"vm_id": vm.vm_id, "known": rotation.told(vm)} for vm in missing],
    }


def _lacking_lines(shown: dict[str, Any]) -> list[str]:
    """Say which VMs stand in the way, while there is more than one key to pin."""
    if sum(row["state"] != "retired" for row in shown["keys"]) == 1:
        return []
    lines = [f"not known to pin {shown['newest']}: {vm['vm_id']}, {vm['known']}" for vm in shown["lacking"]]
    return lines or [f"each VM's newest boot pins {shown['newest']}"]


def _key_id(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{16}", text) is None:
        raise UsageError(
            "A key's ID has another form.",
            expected="16 hex digits in lower case, as `identity show` prints them",
            found=ascii(text[:80]),
        )
    return text
