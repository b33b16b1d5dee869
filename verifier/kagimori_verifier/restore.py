"""Make a verifier out of a backup, on an empty machine, and say what a verifier of an older day does not know.

All is made and checked beside the directory, which gets its name last. What happened after the backup is forgotten, and
some of that must not come back:

- sessions: a challenge that was answered since would be unused again. The token key is made new, so no session of before is
  redeemed, and kept answers are dropped;
- boots without a TPM: which of them have had their one answer since, nobody knows any more. Their VMs are disabled, until
  their owner has switched them off and enables them. Boots below an SVSM are held by their cap PCR;
- one-time codes of enrolments: one that was used since would be good again. All of them are void.

What the owner has decided since (VMs disabled or removed, chips, policies, references, keys of the verifier) is undone as well,
and no check can know it: the owner is told since when.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import backup_format, identity, ledger
from kagimori_verifier import settings as verifier_settings
from kagimori_verifier.acting import acting_as, owner_of
from kagimori_verifier.backup import DATABASE, ENDORSEMENTS, SETTINGS
from kagimori_verifier.backup_format import BackupBroken
from kagimori_verifier.keystore.kek import FileKek, kek_id
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store, enrolments, identities, redemptions, references, vms
from kagimori_verifier.store import settings as stored
from kagimori_verifier.wrapping import BoxBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_verifier.backup_format import Head
    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Txn

MAX_SETTINGS: Final = verifier_settings.MAX_BYTES
_KEK: Final = "kek"


@dataclass(frozen=True, slots=True)
class Restored:
    """What was made: ``lines`` and ``head`` are the ledger's in the backup, ``created`` its time in seconds since 1970.

    ``kek`` is where the KEK was written, or None where settings have it elsewhere; ``moved`` tells that settings named places
    outside of their directory, and were written anew; ``disabled`` are the VMs that have to be enabled by hand.
    """

    config: Path
    created: int
    lines: int
    head: bytes
    kek: Path | None
    moved: bool
    disabled: tuple[str, ...]


def restore(source: IO[bytes], directory: Path, kek_of: Callable[[Head], bytes], at_s: int) -> Restored:
    """Restore a backup into a directory that is not there yet, or empty. ``kek_of`` gives the KEK, having seen the head.

    Raises OperatorError (BackupBroken, ``kek.other``, LedgerBroken, StoreOutdated); there is no such directory then.
    """
    head, before = backup_format.read_head(source)
    kek = kek_of(head)
    if kek_id(kek) != head.kek_id:
        raise OperatorError(
            "This backup was made under another key-encryption key.",
            code="kek.other",
            expected=f"the KEK {head.kek_id}",
            found=f"the KEK {kek_id(kek)}",
            todo="Give the KEK that belongs to this verifier; nothing was restored.",
        )
    with _place(directory) as building:
        _unpack(source, head, before, kek, building)
        settings, moved = _settings(building)
        place = settings.path(settings.kek.path)
        in_file = settings.kek.provider == "file"
        if in_file:
            _write_private(place, kek)
        made = _settle(settings, kek, head, at_s)
        _sync_all(building)
        building.rename(directory)
        _sync(directory.parent)
    return replace(
        made,
        config=directory / SETTINGS,
        kek=directory / place.relative_to(building.resolve()) if in_file else None,
        moved=moved,
    )


@contextlib.contextmanager
def _place(directory: Path) -> Iterator[Path]:
    """Give a directory beside the one to come; it goes where anything fails. Raises OperatorError.

    What root makes in a directory of another user's, it makes as that user, and the verifier is theirs.
    """
    building = directory.with_name(f".{directory.name}.restoring")
    try:
        with acting_as(owner_of(directory.parent)):
            if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
                raise OperatorError(
                    f"{directory} is in use.",
                    code="restore.exists",
                    expected="a directory that is not there, or empty",
                    found="files in it" if directory.is_dir() else "a file",
                    todo="Restore into another directory; nothing was touched.",
                )
            if building.exists():
                shutil.rmtree(building)  # of a restore that was killed
            building.mkdir(mode=0o700, parents=True)
            try:
                yield building
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    except OSError as error:
        raise OperatorError(
            f"{directory} cannot be made.",
            code="restore.write",
            expected="a file that can be read, and a directory with room that can be written",
            found=f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror),
        ) from error


def _unpack(source: IO[bytes], head: Head, before: bytes, kek: bytes, building: Path) -> None:
    seen = set()
    for name, size, parts in backup_format.read(source, head, before, kek):
        known = name in {SETTINGS, DATABASE} or name.startswith(ENDORSEMENTS)
        if not known or name in seen or (name == SETTINGS and size > MAX_SETTINGS):
            raise BackupBroken(
                "A backup holds what none has.",
                expected=f"{SETTINGS}, {DATABASE} and {ENDORSEMENTS}, each file once",
                found=name,
            )
        seen.add(name)
        path = building / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
    if missing := {SETTINGS, DATABASE} - seen:
        raise BackupBroken(
            "A backup lacks a file.", expected=f"{SETTINGS} and {DATABASE}", found=f"no {min(missing)}"
        )


def _settings(building: Path) -> tuple[Settings, bool]:
    """Read the settings, and put the database where they have it.

    Where they name places outside of their directory, as that of another machine, they are written anew, and those in the
    backup are kept beside.
    """
    path = building / SETTINGS
    settings = verifier_settings.load(path)
    root = building.resolve()
    inside = [settings.endorsements, *([settings.kek.path] if settings.kek.provider == "file" else [])]
    try:
        inside.append(str(settings.database_path))
    except OperatorError:  # no SQLite, which this was written from
        inside.append("..")
    moved = not all((root / name).resolve().is_relative_to(root) for name in inside)
    if moved:
        path.rename(building / f"{SETTINGS}.of-the-backup")
        text = verifier_settings.rewritten(
            settings, database=f"sqlite:///{DATABASE}", endorsements=ENDORSEMENTS.rstrip("/"), kek=_KEK
        )
        path.write_text(text, encoding="utf-8")
        settings = verifier_settings.load(path)
    for name, place in (
        (DATABASE, settings.database_path),
        (ENDORSEMENTS.rstrip("/"), settings.path(settings.endorsements)),
    ):
        if (building / name).exists() and (building / name).resolve() != place.resolve():
            place.parent.mkdir(parents=True, exist_ok=True)
            (building / name).rename(place)
    settings.path(settings.endorsements).mkdir(parents=True, exist_ok=True)
    return settings, moved


def _settle(settings: Settings, kek: bytes, head: Head, at_s: int) -> Restored:
    """Check all of the database, and change what must not come back as it was."""
    kept: list[Path] = []

    def keep(found: str) -> Path:
        kept.append(settings.database_path.with_name(f".schema-{found}"))
        return kept[0]

    Store.upgrade(settings.database_url, keep)
    for path in kept:
        path.unlink()  # the backup is the copy
    store = Store.open(settings.database_url)
    try:
        store.check()
        with store.write() as txn:
            lines, last = ledger.verify(txn)
            _require_openable(txn, kek)
            identity.make_token_key(txn, kek, at_s)
            redemptions.drop_answers(txn)
            enrolments.void_codes(txn)
            disabled = _disable_direct(txn)
            body = {
                "backup_created": head.created,
                "backup_lines": lines,
                "backup_head": last.hex(),
                "disabled": list(disabled),
            }
            ledger.append(txn, at_s=at_s, event="restored", vm_id=None, session=None, body=body)
    finally:
        store.close()
    return Restored(Path(), head.created, lines, last, kek=None, moved=False, disabled=disabled)


def _require_openable(txn: Txn, kek: bytes) -> None:
    """Open every key once, and keep none. Raises OperatorError if one does not open."""
    what = "the verifier's own keys"
    try:
        if stored.get(txn, stored.KEK_ID) != kek_id(kek):
            raise BoxBroken("A database names another KEK.", expected=kek_id(kek), found="another one")
        identity.load(txn, kek)
        for row in identities.all(txn, "signing"):
            identity.private_key(kek, row)
        unlock_keys = UnlockKeys(kek)
        for vm in vms.all(txn):
            for one in vms.volumes(txn, vm.vm_id, state=None):
                what = f"the key of volume {one.uuid} of {vm.vm_id}"
                unlock_keys.unwrap(one.wrapped, vm.vm_id, one.uuid, one.version)
    except BoxBroken as error:
        raise OperatorError(
            "A key in this backup does not open.",
            code="restore.keys",
            expected="every key wrapped under this KEK",
            found=what,
            todo="Take an older backup; nothing was restored.",
        ) from error


def _disable_direct(txn: Txn) -> tuple[str, ...]:
    """Disable the VMs that may boot without a TPM: only the database knew which of their boots had had an answer."""
    disabled = []
    for vm in vms.all(txn):
        kinds = {one.kind for one in references.measurements(txn, vm.profile)}
        if vm.enabled and "snp-direct" in kinds:
            vms.update(txn, replace(vm, enabled=False))
            disabled.append(vm.vm_id)
    return tuple(disabled)


def _write_private(path: Path, kek: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(kek)
    FileKek(path).read()


def _sync_all(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
