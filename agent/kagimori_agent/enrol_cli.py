"""``kagimori-agent enrol``: its options, and the secrets that a person types or a program hands over.

A secret comes from a terminal, without an echo, or from a descriptor; never from an argument, which others can see, nor from
the environment. Import budget: argparse, the error tree and the console; the rest is imported when the verb runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_agent import console
from kagimori_protocol.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_agent.config import Config, Volume
    from kagimori_agent.enrol import Enrolled

MAX_SECRET: Final = 8 << 20
"""Bytes that cryptsetup reads of a key file, too."""
MAX_CODE: Final = 1024

ABOUT: Final = """\
Prove to the owner's verifier what this VM has booted, with the one-time code of `kagimori-verifier vm code`, and get a new
unlock key for each volume: it becomes a keyslot beside those that there are. The header as it was is kept in a file. Nothing
secret travels from here, and the volumes stay open and in use meanwhile.

Do this over a connection of your own: whoever reads the console reads what is typed there."""


def declare(verb: Callable[[str, Any, str, str], argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    enrol = verb("enrol", run, "give volumes a keyslot for an unlock key that the verifier makes", ABOUT)
    enrol.add_argument(
        "--device",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="a LUKS2 volume, by its device; repeatable (default: every volume of agent.toml)",
    )
    enrol.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="UUID",
        help="a LUKS2 volume, by its UUID; repeatable",
    )
    enrol.add_argument("--code-fd", type=int, metavar="N", help="read the code from this descriptor")
    secret = enrol.add_mutually_exclusive_group()
    secret.add_argument(
        "--passphrase-fd",
        type=int,
        metavar="N",
        help="read passphrases from this descriptor, one a line; the last counts for all volumes that follow",
    )
    secret.add_argument(
        "--key-file", type=Path, metavar="FILE", help="an existing key file, all of its bytes"
    )
    enrol.add_argument(
        "--backup",
        type=Path,
        metavar="DIR",
        help="where headers are kept as they were (default: /var/lib/kagimori/headers)",
    )
    enrol.add_argument(
        "--system",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="the system whose doors are looked at (default: this one)",
    )
    enrol.add_argument(
        "--reencrypt",
        action="store_true",
        help="first give each volume a new volume key, which the host cannot know; of the old keyslots only that of the"
        " passphrase or key file given is kept, the others are destroyed; slow. The kernel must have loop devices and dm-mirror:"
        " cryptsetup reads the header from memory, and writes it to memory and disk. What was interrupted is ended by the same"
        " command, if it is a reencryption of this kind, to be begun anew by the next",
    )
    enrol.add_argument(
        "--undo",
        action="store_true",
        help="take the keyslots of an enrolment away again; needs another that opens",
    )
    enrol.add_argument(
        "--slot",
        action="append",
        default=[],
        metavar="N",
        help="with --undo: which keyslot, where there is more than one; repeatable, for a recovery code's beside it",
    )


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kagimori_agent import enrol, header_mirror, memory
    from kagimori_agent.config import load
    from kagimori_agent.enrol_volumes import chosen
    from kagimori_protocol.enrol_code import EnrolCode

    memory.forbid_core_dumps()
    memory.lock_memory()
    config = load(options.config)
    secrets = Secrets(options)
    backups = options.backup or enrol.BACKUPS
    if options.undo:
        targets = enrol.prepared(config, options.device, options.volume, secrets.passphrase)
        removed = enrol.undo(targets, options.slot, console.say, backups)
        _tell(
            options,
            {"removed": removed},
            "the keyslots are gone; at the verifier: volume undo, or volume remove",
        )
        return 0
    code = EnrolCode.parse(secrets.code())
    if options.reencrypt:
        header_mirror.remove_left()
    volumes = [volume for volume, _ in chosen(config, options.device, options.volume)]
    enrol.narrowed(config, code, volumes)
    enrol.require_closed(volumes, options.system)
    volume_keys = _reencrypt(options, config, secrets) if options.reencrypt else {}
    targets = enrol.prepared(config, options.device, options.volume, secrets.passphrase, volume_keys)
    done = enrol.enrol(config, options.config, code, targets, console.say, backups=backups)
    for path in done.backups:
        console.say(f"the header as it was: {path}; remove it once the volume has booted")
    _tell(
        options,
        {
            "verifier": done.verifier,
            "session": done.session,
            "volumes": [
                {"uuid": one.uuid, "name": one.name, "slot": slot, "recovery_slot": recovery}
                for one, slot, recovery in done.volumes
            ],
            "backups": [str(path) for path in done.backups],
            "added_to_config": [one.uuid for one in done.added],
            "confirmed": done.confirmed,
            "confirmation_kept": done.kept,
        },
        f"enrolled {len(done.volumes)} at {done.verifier} (session {done.session})",
        *_recovered(done),
        *([f"{options.config} names them now: build the initramfs anew"] if done.added else []),
        *_unconfirmed(done),
    )
    return 0


class Secrets:
    """Where code and passphrases come from; each is asked for once."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Keep the options; nothing is read here."""
        self._options = options
        self._lines: list[bytes] | None = None
        self._given: dict[str, bytes] = {}

    def code(self) -> str:
        """Give the code as it was typed. Raises UsageError."""
        if self._options.code_fd is not None:
            return _read(self._options.code_fd, MAX_CODE).decode("ascii", "replace")
        return _asked("Code of `kagimori-verifier vm code`: ", "--code-fd")

    def passphrase(self, volume: Volume, device: Path) -> bytes:
        """Give what opens a volume now. Raises UsageError."""
        if volume.uuid not in self._given:
            self._given[volume.uuid] = self._next(volume, device)
        return self._given[volume.uuid]

    def _next(self, volume: Volume, device: Path) -> bytes:
        if self._options.key_file is not None:
            secret = _key_file(self._options.key_file)
        elif self._options.passphrase_fd is not None:
            if self._lines is None:
                self._lines = _read(self._options.passphrase_fd, MAX_SECRET).split(b"\n")
                if len(self._lines) > 1 and not self._lines[-1]:
                    self._lines.pop()
            secret = self._lines[min(len(self._given), len(self._lines) - 1)]
        else:
            words = f"Existing passphrase of {volume.name} ({device}): "
            secret = _asked(words, "--passphrase-fd or --key-file").encode()
        if not secret:
            raise _absent("a passphrase or key of one or more bytes", "none")
        return secret


def _recovered(done: Enrolled) -> list[str]:
    """Say which volumes the owner's recovery code opens by now, under the names that `recovery import` asks for."""
    named = [f"{volume.uuid} ({volume.name})" for volume, _, recovery in done.volumes if recovery is not None]
    if not named:
        return []
    return [
        f"recovery keyslots added: write beside the recovery code that your verifier has shown: {', '.join(named)}"
    ]


def _unconfirmed(done: Enrolled) -> list[str]:
    """Say what to do where the verifier has not heard of an enrolment: its keys stay staged, and open nothing."""
    if done.confirmed:
        return []
    if done.kept:
        return ["the verifier has not heard of it yet: `kagimori-agent confirm`"]
    return [
        (
            "the verifier has not heard of it, and what would tell it cannot be kept: `kagimori-agent enrol --undo`, "
            "at the verifier `volume undo`, then enrol with a new code"
        )
    ]


def _reencrypt(options: argparse.Namespace, config: Config, secrets: Secrets) -> dict[str, bytes]:
    from kagimori_agent import enrol_volumes, reencrypt

    volumes = enrol_volumes.chosen(config, options.device, options.volume)
    return reencrypt.renew(volumes, secrets.passphrase, console.say)


def _asked(words: str, instead: str) -> str:
    import getpass

    if not sys.stdin.isatty():
        raise _absent(f"{instead}, or a terminal to ask on", "neither")
    return getpass.getpass(words)


def _read(descriptor: int, limit: int) -> bytes:
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise _absent("a descriptor that is open for reading", str(error.strerror)) from error
    if len(content) > limit:
        raise _absent(f"at most {limit} bytes", "more")
    return content


def _key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET + 1)
    except OSError as error:
        raise _absent(f"a key file {path} that can be read", str(error.strerror)) from error
    if len(content) > MAX_SECRET:
        raise _absent(f"at most {MAX_SECRET} bytes in {path}", "more")
    return content


def _absent(expected: str, found: str) -> UsageError:
    return UsageError("A secret cannot be taken.", code="enrol.secret", expected=expected, found=found)


def _tell(options: argparse.Namespace, value: dict[str, Any], *lines: str) -> None:
    if options.json:
        import json

        print(json.dumps(value, indent=2))
        return
    for line in lines:
        print(line)
