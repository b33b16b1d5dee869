"""``endorsements``: certificates, revocation lists, and roots beside AMD's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, Malformed, OperatorError, UsageError
from kagimori_verifier import ledger
from kagimori_verifier.acting import acting_as
from kagimori_verifier.claims import Root
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import exists, now_s, opened, reading, unknown, writing
from kagimori_verifier.cli.files import read_file
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.endorsements.directory import UNFINISHED, EndorsementDirectory
from kagimori_verifier.roots import AMD_ROOTS, PRODUCTS
from kagimori_verifier.store import roots
from kagimori_verifier.verify.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_verifier.cli.output import Verbs

_ARK: Final = "ARK-"
AMD: Final = "AMD"


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    endorsements = group(
        add_verb(
            verbs,
            "endorsements",
            None,
            "Manage AMD's certificates and revocation lists, and whose roots are trusted.",
            "endorsements list",
        )
    )
    add = add_verb(
        endorsements,
        "import",
        _import,
        "Keep certificates and revocation lists: PEM, DER, or a certificate table. Of a directory, all files that hold\n"
        "some; of files, each must. Importing again changes nothing.",
        "endorsements import cert_chain.pem crl.der",
    )
    add.add_argument("path", nargs="+", type=Path, metavar="FILE|DIR")
    add_verb(endorsements, "list", _list, "List what is kept.", "endorsements list")
    root = group(
        add_verb(
            endorsements, "root", None, "Manage roots beside AMD's pinned ones.", "endorsements root list"
        )
    )
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
    add.add_argument("--label", required=True, type=_label, help="what verdicts call it")
    add_verb(root, "list", _root_list, "List every trusted root.", "endorsements root list")
    remove = add_verb(
        root, "remove", _root_remove, "Trust an added root no longer.", "endorsements root remove 9f05..."
    )
    remove.add_argument(
        "spki", type=arguments.spki, metavar="SHA256", help="its pin, as `endorsements root list` shows it"
    )


def _label(text: str) -> str:
    if text.strip().casefold() == AMD.casefold():
        raise UsageError(
            "A root that is not AMD's cannot be called so.", expected="another label", found=text
        )
    return arguments.label(text)


def _import(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, _):
        directory = EndorsementDirectory(settings.path(settings.endorsements))

        def keep(raw: bytes) -> list[str]:
            with acting_as(settings.owner):
                return directory.add(raw)

        lines = [line for path in options.path for line in _imported(keep, path, output)]
    if not lines:
        raise UsageError(
            "There is nothing to import.",
            expected="files, or directories with files, that hold certificates or revocation lists",
            found="none",
        )
    output.result({"imported": lines}, *lines)
    return 0


def _imported(keep: Callable[[bytes], list[str]], path: Path, output: Output) -> list[str]:
    """Keep what one file, or the files of one directory, hold; an error names the file."""
    if not path.is_dir():
        try:
            return [f"{path}: {line}" for line in keep(read_file(path))]
        except KagimoriError as error:
            known = error.as_dict() | {"what": f"{path}: {error.what}"}
            raise type(error)(**known) from error
    lines = []
    for file in sorted(one for one in path.iterdir() if one.is_file()):
        try:
            lines += [f"{file}: {line}" for line in keep(read_file(file))]
        except (OperatorError, Malformed) as error:
            if error.code == "endorsements.write":
                raise
            output.note(f"{file} holds no endorsement: {error.what}")
    return lines


def _list(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, _):
        directory = settings.path(settings.endorsements)
        rows = [
            {"file": str(path.relative_to(directory)), "bytes": path.stat().st_size}
            for path in sorted(directory.rglob("*.der"))
            if not path.parent.name.startswith(UNFINISHED)
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
            raise exists("root", pin.hex(), "`kagimori-verifier endorsements root list` shows them.")
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
        {"spki_sha256": root.spki_sha256.hex(), "product": root.product, "whose": root.label or AMD}
        for root in trusted
    ]
    output.rows(rows, "whose", "product", "spki_sha256", none="no roots")
    return 0


def _root_remove(options: argparse.Namespace, output: Output) -> int:
    pin = options.spki.hex()
    with writing(options) as txn:
        if not roots.remove(txn, options.spki):
            raise unknown(
                "added root", pin, "`kagimori-verifier endorsements root list` shows them; AMD's stay."
            )
        body = {"spki_sha256": pin}
        ledger.append(txn, at_s=now_s(), event="root-removed", vm_id=None, session=None, body=body)
    output.result({"removed": pin}, "this root is trusted no longer")
    return 0
