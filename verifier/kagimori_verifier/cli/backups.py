"""``backup``, ``restore``: a verifier in one file, and a verifier out of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kagimori_protocol.errors import UsageError
from kagimori_verifier import backup, backup_format, restore
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import now_s, opened
from kagimori_verifier.cli.output import Output, add_verb, when
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.cli.secret_input import first_line
from kagimori_verifier.keystore.kek import FileKek

if TYPE_CHECKING:
    from kagimori_verifier.backup_format import Head
    from kagimori_verifier.cli.output import Verbs


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    parser = add_verb(
        verbs,
        "backup",
        _backup,
        "Write the database, settings and endorsements into one new file, also while the verifier serves. All of it is\n"
        "encrypted and authenticated under the key-encryption key (KEK), which is not in it: keep the KEK elsewhere.",
        "backup /backup/verifier-2026-11-26",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a new file; one that exists is not touched")
    parser.add_argument(
        "--with-kek",
        action="store_true",
        help="put the KEK in, too, sealed with a passphrase: file and passphrase together are all keys",
    )
    parser.add_argument(
        "--passphrase-fd",
        type=arguments.descriptor,
        metavar="N",
        help=f"read that passphrase from this descriptor, up to a newline; {backup_format.MIN_PASSPHRASE} bytes or more",
    )
    parser = add_verb(
        verbs,
        "restore",
        _restore,
        "Make a verifier out of a backup, in a new directory, after checking all of it. Never run two verifiers of one\n"
        "backup. What the owner has changed since the backup is as it was before: look through it before `serve`.",
        "restore /backup/verifier-2026-11-26 --dir /etc/kagimori --kek /media/stick/kek",
        configured=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that `backup` has made")
    parser.add_argument(
        "--dir", type=Path, required=True, metavar="DIR", help="where it is made: not there yet, or empty"
    )
    key = parser.add_mutually_exclusive_group(required=True)
    key.add_argument("--kek", type=Path, metavar="FILE", help="the KEK of this verifier, mode 0600 or 0400")
    key.add_argument(
        "--passphrase-fd",
        type=arguments.descriptor,
        metavar="N",
        help="read the passphrase of a backup --with-kek from this descriptor, up to a newline",
    )


def _backup(options: argparse.Namespace, output: Output) -> int:
    if options.with_kek != (options.passphrase_fd is not None):
        raise UsageError(
            "The KEK is backed up with a passphrase, or not at all.",
            expected="--with-kek and --passphrase-fd together, or neither",
            found="one of them",
        )
    with opened(options) as (settings, store):
        kek = own_kek(settings, store)
        passphrase = _passphrase(options.passphrase_fd) if options.with_kek else None
        made = backup.make(settings, options.config, store, kek, options.file, now_s(), passphrase)
    output.result(
        {
            "file": str(options.file),
            "bytes": made.size,
            "with_kek": options.with_kek,
            "lines": made.lines,
            "head": made.head.hex(),
        },
        f"{options.file}: {made.size} bytes, read again and found whole",
        f"ledger line {made.lines}, head {made.head.hex()}",
        "the KEK is in it, behind the passphrase"
        if options.with_kek
        else "the KEK is not in it: without its own copy, elsewhere, this file opens nowhere",
    )
    if settings.tls is not None:
        output.note("certificate and key of [tls] are not in it")
    return 0


def _restore(options: argparse.Namespace, output: Output) -> int:
    def kek_of(head: Head) -> bytes:
        if options.kek is not None:
            return FileKek(options.kek).read()
        return backup_format.kek_in(head, _passphrase(options.passphrase_fd))

    try:
        with options.file.open("rb") as source:
            made = restore.restore(source, options.dir.resolve(), kek_of, now_s())
    except OSError as error:
        raise UsageError(
            f"{options.file} cannot be read.",
            code="file.read",
            expected="a file that `kagimori-verifier backup` has made",
            found=str(error.strerror),
        ) from error
    output.result(
        {
            "config": str(made.config),
            "backup_created": made.created,
            "lines": made.lines,
            "head": made.head.hex(),
            "kek": None if made.kek is None else str(made.kek),
            "settings_rewritten": made.moved,
            "disabled": list(made.disabled),
        },
        f"restored {made.config}, as it was on {when(made.created)} UTC",
        f"ledger line {made.lines}, head {made.head.hex()}: later heads that you published are of what is lost",
        "open sessions and codes of before are void; everything that was changed since that day is to be done again:",
        "  vm list, volume list, reference list, profile list, identity show",
        *(
            f"disabled {vm}: it boots without a TPM. Switch it off, then: kagimori-verifier vm enable {vm}"
            for vm in made.disabled
        ),
        f"next: kagimori-verifier --config {made.config} serve, when no other verifier of this backup runs",
    )
    if made.kek is None:
        output.note("the KEK is not in that directory: [kek] in verifier.toml says where it is read")
    if made.moved:
        output.note(f"paths in verifier.toml were written anew; as it was: {made.config}.of-the-backup")
    return 0


def _passphrase(descriptor: int) -> bytes:
    return first_line(descriptor, "passphrase", "backup.passphrase")
