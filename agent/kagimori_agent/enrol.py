"""Enrol volumes from a booted, attested system: an operator's code in, new keyslots out (docs/protocol.md section 3, ADR 9).

::

    code names the verifier  ->  host doors  ->  headers and passphrases  ->  evidence, with the code's proof
      ->  for each volume: the header as it was is kept, the keyslot is added, proved, written
      ->  agent.toml  ->  Confirm: opened

Everything that can fail without the verifier comes before it, so that a code is not spent on a mistyped passphrase. No
secret travels to the verifier: it makes the keys. Killed at any point, the volumes open by what opened them before; a
keyslot that no Confirm followed is removed by ``undo``, or stays and is never asked for.

Import budget: that of ``unlock``, ``keyslots`` and ``host_doors``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import UNSET

from kagimori_agent import confirm, host_doors, keyslots
from kagimori_agent.attempt import attest
from kagimori_agent.budget import Budget
from kagimori_agent.enrol_volumes import add_to_config, chosen
from kagimori_agent.unlock import attester, require_keys, send_confirm
from kagimori_protocol import transcript
from kagimori_protocol.errors import DiskError, KagimoriError, OperatorError, PeerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kagimori_agent.attempt import Answered
    from kagimori_agent.config import Config, Volume
    from kagimori_protocol.enrol_code import EnrolCode
    from kagimori_protocol.luks2_change import Change, Image
    from kagimori_protocol.messages import Keys, VolumeKey

BACKUPS: Final = Path("/var/lib/kagimori/headers")
"""Where headers are kept as they were; on the root, which is encrypted."""


@dataclass(frozen=True, slots=True)
class Target:
    """A volume that is to be enrolled: where it is, what opens it now, and its volume key if that was made in this run."""

    volume: Volume
    device: Path
    passphrase: bytes = field(repr=False)
    volume_key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What has become of an enrolment: each volume with its new keyslots, and whether the verifier knows.

    The second keyslot of a volume is the recovery code's, or None where the owner has none made. ``kept`` tells whether a confirmation that it has not taken can be sent again.
    """

    verifier: str
    session: str
    volumes: tuple[tuple[Volume, str, str | None], ...]
    backups: tuple[Path, ...]
    added: tuple[Volume, ...]
    confirmed: bool
    kept: bool


@dataclass(slots=True)
class _Done:
    """Keyslots that were written: ``slot`` is the unlock key's."""

    target: Target
    change: Change
    kept: Path
    slot: str
    recovery: str | None

    @property
    def slots(self) -> list[str]:
        """Name them."""
        return [self.slot] if self.recovery is None else [self.slot, self.recovery]

    @property
    def words(self) -> str:
        """Name them to a person."""
        return (
            f"keyslot {self.slot}" if self.recovery is None else f"keyslots {self.slot} and {self.recovery}"
        )


def enrol(  # noqa: PLR0913 - who, where, by what, for which volumes, and what a caller may want otherwise
    config: Config,
    path: Path,
    code: EnrolCode,
    targets: Sequence[Target],
    say: Callable[[str], None],
    *,
    backups: Path = BACKUPS,
) -> Enrolled:
    """Enrol volumes whose passphrases are known to open them (``prepared``); ``path`` is the agent.toml of ``config``.

    Where this run has made all their volume keys, and each is still its header's, the verifier hears that the volumes were
    reencrypted. Raises Refused if the verifier says no, and the first error; what was written is taken back then, and the
    verifier is told.
    """
    asking = narrowed(config, code, [target.volume for target in targets])
    with attester(asking, say) as one:
        answered = attest(asking, one, "enrol", Budget(config.limits.boot_budget_s), say, prove=code.prove)
    done: list[_Done] = []
    try:
        keys, recovery_key = _keys_for(answered, targets)
        for target in targets:
            done.append(_add(target, keys[target.volume.uuid], recovery_key, backups))
            _tell_added(done[-1], say)
            _tell_others(done[-1], say)
        added = add_to_config(path, config, [target.volume for target in targets])
    except KagimoriError:
        answered = answered.without_payload()
        _take_back(done, backups, say)
        send_confirm(config, answered, "failed", say)
        raise
    answered = answered.without_payload()
    confirmed = send_confirm(config, answered, "opened", say)
    kept = not confirmed and confirm.keep(
        answered.endpoint, answered.confirm("opened"), confirm.PATH, make_place=True
    )
    if kept:
        say(f"the confirmation is kept in {confirm.PATH}: `kagimori-agent confirm` sends it")
    reencrypted = bool(done) and all(one.target.volume_key is not None for one in done)
    if reencrypted and not (confirmed and send_confirm(config, answered, "reencrypted", say)):
        say(
            "the verifier has not heard of the new volume keys: `kagimori-verifier volume provenance` tells it"
        )
    return Enrolled(
        verifier=answered.endpoint.name,
        session=transcript.session_id(answered.session),
        volumes=tuple((one.target.volume, one.slot, one.recovery) for one in done),
        backups=tuple(one.kept for one in done),
        added=tuple(added),
        confirmed=confirmed,
        kept=kept,
    )


def prepared(  # noqa: PLR0913 - which volumes of what, by what they open, and what is known of them
    config: Config,
    devices: Sequence[Path],
    uuids: Sequence[str],
    secret: Callable[[Volume, Path], bytes],
    volume_keys: Mapping[str, bytes] | None = None,
    root: Path = Path("/"),
) -> list[Target]:
    """Look at each volume as an agent will, and try what is said to open it. Raises DiskError, UsageError.

    ``volume_keys`` are those that were just made, by UUID (``reencrypt.renew``).
    """
    targets = []
    for volume, device in chosen(config, devices, uuids, root):
        volume_key = (volume_keys or {}).get(volume.uuid)
        with keyslots.opened(device) as disk:
            image = _loaded(disk, volume, volume_key)
        passphrase = secret(volume, device)
        if keyslots.opens(image, passphrase) is None:
            raise DiskError(
                f"{device} does not open with what was given.",
                code="enrol.passphrase",
                expected="a passphrase or key of one of its keyslots",
                found="one that opens none",
                todo="Try again; no code was spent.",
            )
        targets.append(Target(volume, device, passphrase, volume_key))
    return targets


def require_closed(volumes: Sequence[Volume], root: Path = Path("/")) -> None:
    """Raise OperatorError while a door of this system lets its host in, unless it is accepted by name."""
    open_ones = host_doors.open_doors(root, [volume.uuid for volume in volumes])
    if open_ones:
        raise OperatorError(
            "This system lets its host in, so what it holds would not be safe behind an attested boot.",
            code="enrol.doors",
            expected=f"no open door, or each accepted by name in /{host_doors.ACCEPTED}",
            found="; ".join(f"{door.id}: {door.found}" for door in open_ones),
            todo="`kagimori-agent doctor --host-doors` says how to close each.",
        )


def narrowed(config: Config, code: EnrolCode, volumes: Sequence[Volume]) -> Config:
    """Give the configuration that asks the one verifier, and believes the one key, that the code names.

    Until the enrolment, agent.toml lies on a disk of the host's: its keys may be the host's, too (THREATS T18). Raises
    OperatorError if none of them is the code's.
    """
    for verifier in config.verifiers:
        for key in verifier.keys:
            if code.is_for(key):
                only = msgspec.structs.replace(verifier, keys=[key])
                return msgspec.structs.replace(config, verifiers=[only], volumes=list(volumes))
    raise OperatorError(
        "agent.toml does not name the verifier that the code is of.",
        code="enrol.verifier",
        expected=f"a verifier key whose SHA-256 begins with {code.fingerprint.hex()}",
        found=", ".join(verifier.name for verifier in config.verifiers),
        todo="If the code is your verifier's, somebody has changed agent.toml: print it again with `vm config`.",
    )


def undo(
    targets: Sequence[Target], slots: Sequence[str], say: Callable[[str], None], backups: Path = BACKUPS
) -> list[str]:
    """Take the keyslots of an enrolment away from each volume, once another was proved to open; gives what was removed.

    Raises UsageError where more than one could be meant and ``slots`` do not say which, DiskError.
    """
    removed = []
    for target in targets:
        with keyslots.opened(target.device) as disk:
            image = _loaded(disk, target.volume, target.volume_key)
            ours = keyslots.ours(image)
            meant = [one for one in ours if one in slots] if slots else ours
            if len(meant) != (len(slots) or 1):
                raise UsageError(
                    f"It cannot be told which keyslot of {target.device} is meant.",
                    code="enrol.slot",
                    expected="one keyslot of an enrolment, or --slot to name each that is to go: a recovery code's, too",
                    found=", ".join(ours) or "none",
                )
            if keyslots.opens(image, target.passphrase) in {None, *meant}:
                raise DiskError(
                    "No other keyslot was proved to open.",
                    code="enrol.last",
                    expected="a passphrase or key of another keyslot than what is to be removed",
                    found="none",
                    todo="Without one, removing this keyslot could lose the volume.",
                )
            for slot in meant:
                change = keyslots.remove(image, slot)
                disk.write(change, _backup(backups, target.volume.uuid))
                image = change.after
                say(f"{target.volume.name}: keyslot {slot} removed")
        removed.append(target.volume.uuid)
    return removed


def _keys_for(answered: Answered, targets: Sequence[Target]) -> tuple[dict[str, VolumeKey], bytes | None]:
    """Give the answer's key of each volume, and its recovery key if it has one. Raises Refused, or PeerError for an answer that leaves one out."""
    keys: Keys = require_keys(answered)
    by_uuid = {key.uuid: key for key in keys.volumes}
    if missing := [one.volume.uuid for one in targets if one.volume.uuid not in by_uuid]:
        raise PeerError(
            "The answer has no key for a volume.",
            code="answer.volume",
            expected=", ".join(missing),
            found=", ".join(sorted(by_uuid)),
        )
    return by_uuid, None if keys.recovery_key is UNSET else keys.recovery_key


def _loaded(disk: keyslots.Disk, volume: Volume, volume_key: bytes | None) -> Image:
    """Read the header that is looked at, or changed: the host may show another each time. Raises DiskError.

    Its UUID is the one that is enrolled, and its volume key the one that was made, if that was.
    """
    image = disk.load()
    if image.header.uuid != volume.uuid:
        raise DiskError(
            f"{disk.path} is another volume by now.",
            code="enrol.device",
            expected=f"a header with UUID {volume.uuid}",
            found=image.header.uuid,
            todo="See which disk is attached there. If nobody has changed it, the host has.",
        )
    if volume_key is not None:
        keyslots.require_volume_key(image, volume_key)
    return image


def _add(target: Target, key: VolumeKey, recovery_key: bytes | None, backups: Path) -> _Done:
    """Add the keyslots of a volume, all of them by one change of its header, or none."""
    epoch, passphrase = key.header_epoch, target.passphrase
    with keyslots.opened(target.device) as disk:
        image = _loaded(disk, target.volume, target.volume_key)
        recovery: str | None = None
        if recovery_key is None:
            change = keyslots.add(image, passphrase, key.unlock_key, epoch)
            slot = change.slot
        else:
            change, slot = keyslots.add_two(image, passphrase, key.unlock_key, recovery_key, epoch)
            recovery = change.slot
        kept = _backup(backups, target.volume.uuid)
        disk.write(change, kept)
    return _Done(target, change, kept, slot, recovery)


def _tell_added(one: _Done, say: Callable[[str], None]) -> None:
    say(f"{one.target.volume.name}: keyslot {one.slot} added, and proved to open")
    if one.recovery is not None:
        say(
            f"{one.target.volume.name}: recovery keyslot {one.recovery} added, and proved to open: "
            f"write UUID {one.target.volume.uuid} beside the recovery code"
        )


def _tell_others(one: _Done, say: Callable[[str], None]) -> None:
    """Name sealed keyslots that were there before. Whose they are, no header tells, so nothing removes them by itself."""
    for slot in keyslots.ours(one.change.before):
        say(
            f"{one.target.volume.name}: keyslot {slot} is sealed, too. Unless it is a recovery code's or another verifier's, an "
            f"enrolment that was cut off has left it: `kagimori-agent enrol --undo --device {one.target.device} --slot {slot}`"
        )


def _take_back(done: Sequence[_Done], backups: Path, say: Callable[[str], None]) -> None:
    """Remove keyslots that were written before something failed; one that has to stay is named."""
    for one in done:
        try:
            with keyslots.opened(one.target.device) as disk:
                image = _loaded(disk, one.target.volume, one.target.volume_key)
                for slot in one.slots:
                    change = keyslots.remove(image, slot)
                    disk.write(change, _backup(backups, one.target.volume.uuid))
                    image = change.after
            say(f"{one.target.volume.name}: {one.words} removed again")
        except KagimoriError as error:
            named = " ".join(f"--slot {slot}" for slot in one.slots)
            say(
                f"{one.target.volume.name}: {one.words} may still be there ({error.reason}); "
                f"`kagimori-agent enrol --undo --device {one.target.device} {named}` removes what is"
            )


def _backup(directory: Path, uuid: str) -> Path:
    """Name a file for a header as it was: by the time, so that no two meet."""
    return (
        directory
        / f"{uuid}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.monotonic_ns() % 10**6:06}.luks2"
    )
