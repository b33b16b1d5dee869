"""``endorsements``: certificates, revocation lists, and roots beside AMD's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_verifier import ledger
from kagimori_verifier.claims import Root
from kagimori_verifier.cli.output import (
    Output,
    add_verb,
    exists,
    group,
    now_s,
    opened,
    read_file,
    reading,
    unknown,
    writing,
)
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.roots import AMD_ROOTS, PRODUCTS
from kagimori_verifier.store import roots
from kagimori_verifier.verify.certificate import Certificate

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs

_ARK = "ARK-"


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    endorsements = group(
        add_verb(verbs, "endorsements", None, "AMD's certificates and revocation lists, kept in a directory.")
    )
    add = add_verb(
        endorsements,
        "import",
        _import,
        "Keep certificates and revocation lists: PEM, DER, or a certificate table.",
        "endorsements import cert_chain.pem crl.der",
    )
    add.add_argument("path", nargs="+", type=Path, metavar="FILE|DIR")
    add_verb(endorsements, "list", _list, "List what is kept.", "endorsements list")
    root = group(add_verb(endorsements, "root", None, "Roots beside AMD's pinned ones."))
    add = add_verb(
        root,
        "add",
        _root_add,
        "Trust a root that is not AMD's; every verdict made with it says so.",
        "endorsements root add --certificate ark.der --label simulated",
    )
    add.add_argument(
        "--certificate", required=True, type=Path, metavar="FILE", help="an ARK certificate, PEM or DER"
    )
    add.add_argument("--label", required=True, help="what verdicts call it")
    add_verb(root, "list", _root_list, "List every trusted root.", "endorsements root list")
    remove = add_verb(
        root, "remove", _root_remove, "Trust an added root no longer.", "endorsements root remove 9f05..."
    )
    remove.add_argument("spki", metavar="SHA256")


def _import(options: argparse.Namespace, output: Output) -> int:
    files = [one for path in options.path for one in (sorted(path.iterdir()) if path.is_dir() else [path])]
    if not files:
        raise UsageError(
            "There is nothing to import.", expected="files, or directories with files", found="none"
        )
    with opened(options) as (settings, _):
        kept = EndorsementDirectory(settings.path(settings.endorsements))
        lines = [f"{file}: {line}" for file in files for line in kept.add(read_file(file))]
    output.result({"imported": lines}, *lines)
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, _):
        directory = settings.path(settings.endorsements)
        rows = [
            {"file": str(path.relative_to(directory)), "bytes": path.stat().st_size}
            for path in sorted(directory.rglob("*.der"))
        ]
    output.rows(rows, "file", "bytes", none="nothing is kept")
    return 0


def _root_add(options: argparse.Namespace, output: Output) -> int:
    certificate = Certificate.parse(certificate_table.to_der(read_file(options.certificate)))
    certificate.require_signed_by(certificate)
    product = certificate.common_name.removeprefix(_ARK)
    if product not in PRODUCTS or not certificate.common_name.startswith(_ARK):
        raise OperatorError(
            "This certificate is no ARK.",
            code="root.name",
            expected=" or ".join(_ARK + known for known in PRODUCTS),
            found=certificate.common_name,
        )
    pin = certificate.spki_sha256
    with writing(options) as txn:
        if pin in {root.spki_sha256 for root in AMD_ROOTS} | {row.spki_sha256 for row in roots.all(txn)}:
            raise exists("root", pin.hex())
        roots.add(txn, roots.RootRow(pin, product, options.label, now_s()))
        body = {"spki_sha256": pin.hex(), "product": product, "label": options.label}
        ledger.append(txn, at_s=now_s(), event="root-added", vm_id=None, session=None, body=body)
    output.note("whoever holds this root's key can make any evidence; every verdict made with it will say so")
    output.result(body, f"trusted: {Root(pin, product, options.label)}")
    return 0


def _root_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        added = [Root(row.spki_sha256, row.product, row.label) for row in roots.all(txn)]
    trusted: list[Root] = [*AMD_ROOTS, *added]
    rows = [
        {"spki_sha256": root.spki_sha256.hex(), "product": root.product, "whose": root.label or "AMD"}
        for root in trusted
    ]
    output.rows(rows, "whose", "product", "spki_sha256", none="no roots")
    return 0


def _root_remove(options: argparse.Namespace, output: Output) -> int:
    try:
        pin = bytes.fromhex(options.spki)
    except ValueError as error:
        raise UsageError(
            "A root is named by its key's SHA-256.", expected="64 hex digits", found=options.spki
        ) from error
    with writing(options) as txn:
        if not roots.remove(txn, pin):
            raise unknown(
                "added root",
                options.spki,
                "`kagimori-verifier endorsements root list` shows them; AMD's stay.",
            )
        ledger.append(
            txn, at_s=now_s(), event="root-removed", vm_id=None, session=None, body={"spki_sha256": pin.hex()}
        )
    output.result({"removed": pin.hex()}, "this root is trusted no longer")
    return 0
