"""The story on one page: prepare, challenge, collect, exchange, open, cap, confirm.

``unlock`` caps whatever happens, so that nobody who comes after it in this boot can ask for the key again; ``dry_run``
asks the same question without a key and leaves the boot as it was. PROTOCOL.md section 7.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kagimori_agent import cmdline, confirm, console, crypttab, exchange, luks, opened
from kagimori_agent.attempt import Answered, attest
from kagimori_agent.budget import Budget
from kagimori_agent.cap import cap
from kagimori_agent.collect import Attester, SnpDirect, SvsmVtpm
from kagimori_agent.devices import device_class, doors
from kagimori_protocol import messages, transcript
from kagimori_protocol.errors import (
    DiskError,
    KagimoriError,
    NetworkError,
    PeerError,
    Refused,
    UsageError,
)
from kagimori_protocol.messages import Keys, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_agent.cap import Capped
    from kagimori_agent.config import Config
    from kagimori_protocol.messages import Check, Outcome


@dataclass(frozen=True, slots=True)
class Opened:
    """One volume: its mapping name, and whether it is ``mapped`` or the key was only ``proved``."""

    uuid: str
    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Unlocked:
    """All volumes are open, the boot is capped; ``confirmed`` tells whether the verifier knows it already."""

    verifier: str
    session: str
    volumes: tuple[Opened, ...]
    capped: tuple[Capped, ...] = ()
    confirmed: bool = False


def unlock(config: Config, say: Callable[[str], None], *, prove: bool = False) -> Unlocked:
    """Get the keys, open the volumes, cap this boot, confirm. Raises the first error, after capping.

    ``prove`` tries the keys without mapping anything, for kernels without device-mapper; it is never chosen silently.
    """
    answered: Answered | None = None
    outcome: Outcome = "failed"
    unlocked: Unlocked | None = None
    try:
        answered, unlocked = _get_and_open(config, say, prove=prove)
        outcome = "opened"
    except _NotOpenedError as error:
        answered = error.answered
        outcome = "received" if isinstance(error.reason, Refused) else "failed"
        raise error.reason from None
    finally:
        capped = cap_boot(config)
        confirmed = answered is not None and send_confirm(config, answered, outcome, say)
        # Where the volumes are not open, there will be no booted system to send it.
        if answered is not None and not confirmed and outcome == "opened":
            _keep_confirm(answered, outcome, say)
    return replace(unlocked, capped=tuple(capped), confirmed=confirmed)


def dry_run(config: Config, say: Callable[[str], None]) -> tuple[Verdict, Answered]:
    """Ask for the verdict on this boot as it is; no key travels, no PCR changes. Raises as ``attest`` does."""
    _heed_command_line(config)
    with attester(config, say) as one:
        answered = attest(config, one, "dry-run", Budget(config.limits.boot_budget_s), say)
    if not isinstance(answered.payload, Verdict):
        raise PeerError(
            "A dry-run was answered with something else than a verdict.",
            code="answer.purpose",
            expected="a verdict",
            found=type(answered.payload).__name__.lower(),
        )
    send_confirm(config, answered, "received", say)
    return answered.payload, answered


def cap_boot(config: Config) -> list[Capped]:
    """Cap every TPM of this VM; a kind without a TPM has none that must be there."""
    driver = config.tpm.driver if config.kind == "svsm-vtpm" else None
    return cap(config.tpm.cap_pcr, driver=driver, tcti=config.tpm.tcti)


@contextlib.contextmanager
def attester(config: Config, say: Callable[[str], None]) -> Iterator[Attester]:
    """Open the devices that this kind of evidence needs; the network library loads meanwhile."""
    threading.Thread(target=exchange.preload, daemon=True).start()
    root, device = config.tsm.root, config.sev_guest.device
    if config.kind == "snp-direct":
        door = doors.choose(config.report_door, root, device)
        say(f"report door: {door}, of {', '.join(doors.existing(root, device)) or 'none'}")
        yield SnpDirect(doors.open_plain(door, root, device))
        return
    tsm = device_class(doors.CONFIGFS_TSM)(root)
    device_class("vtpm")
    from kagimori_agent.devices.vtpm import open_vtpm  # noqa: PLC0415 - loads the TPM library; only this kind needs it

    with open_vtpm(driver=config.tpm.driver, tcti=config.tpm.tcti, event_log=config.tpm.event_log) as vtpm:
        certificates = doors.HostCertificates(device, tsm.guest_vmpl, say)
        yield SvsmVtpm(tsm, vtpm, config.tpm.cap_pcr, certificates)


class KeyRefused(Refused):
    """The verifier's verdict on this boot is no; ``checks`` are those that do not hold."""

    def __init__(self, what: str, checks: list[Check], todo: str) -> None:
        """Keep the checks beside the words."""
        super().__init__(
            what,
            expected="; ".join(f"{check.id}: {check.expected}" for check in checks) or "every check to hold",
            found="; ".join(f"{check.id}: {check.found}" for check in checks) or "a refusal without a reason",
            todo=todo,
        )
        self.checks = checks


class _NotOpenedError(Exception):
    """Carries an answer out of a failure, so that the verifier can be told that the volumes did not open."""

    def __init__(self, answered: Answered, reason: KagimoriError) -> None:
        super().__init__()
        self.answered = answered
        self.reason = reason


def _get_and_open(config: Config, say: Callable[[str], None], *, prove: bool) -> tuple[Answered, Unlocked]:
    if not config.volumes:
        raise UsageError(
            "There is nothing to unlock.",
            code="unlock.no-volumes",
            expected="at least one [[volumes]] in agent.toml",
            found="none",
        )
    _heed_command_line(config)
    with attester(config, say) as one:
        answered = attest(config, one, "unlock", _patience(config), say)
    try:
        keys = require_keys(answered)
        opened = tuple(_open(config, keys, say, prove=prove))
    except KagimoriError as error:
        raise _NotOpenedError(answered.without_payload(), error) from error
    return answered.without_payload(), Unlocked(
        answered.endpoint.name, transcript.session_id(answered.session), opened
    )


def _heed_command_line(config: Config) -> None:
    """Refuse a boot whose command line says more to us than it may (PROTOCOL.md section 1), renames our volumes, or is not alone."""
    cmdline.check_alone()
    line = cmdline.read()
    cmdline.check_names(line, {volume.uuid: volume.name for volume in config.volumes})
    if line.debug:
        console.debug()


def _patience(config: Config) -> Budget:
    """Give the time that this boot may wait for a verifier that is away."""
    return Budget(math.inf if config.boot.wait == "forever" else config.limits.boot_budget_s)


def require_keys(answered: Answered) -> Keys:
    """Return the keys, or raise Refused with every check that failed."""
    payload = answered.payload
    if isinstance(payload, Keys):
        return payload
    if not isinstance(payload, Verdict):
        raise PeerError("An answer is neither keys nor a verdict.", code="answer.purpose")
    explain = f"`kagimori-verifier explain {transcript.session_id(answered.session)}`"
    raise KeyRefused(
        f"{answered.endpoint.name}: refuses the key.",
        [check for check in payload.checks if not check.ok],
        f"The owner sees every check: {explain}.",
    )


def _open(config: Config, keys: Keys, say: Callable[[str], None], *, prove: bool) -> Iterator[Opened]:
    by_uuid = {key.uuid: key for key in keys.volumes}
    if not prove:
        opened.begin()
    for volume in config.volumes:
        key = by_uuid.get(volume.uuid)
        if key is None:
            raise DiskError(
                f"The answer has no key for {volume.name}.",
                code="answer.volume",
                expected=f"a key for volume {volume.uuid}",
                found=", ".join(sorted(by_uuid)),
            )
        how = luks.open_volume(
            volume,
            key.unlock_key,
            header_epoch=key.header_epoch,
            prove=prove,
            timeout_s=config.limits.cryptsetup_s,
            say=say,
            flags=crypttab.flags(volume.name),
        )
        if not prove:
            # For the check that the root rests on it, before it becomes /.
            opened.remember(volume)
        say(f"{volume.name}: {how}")
        yield Opened(volume.uuid, volume.name, how)


def send_confirm(config: Config, answered: Answered, outcome: Outcome, say: Callable[[str], None]) -> bool:
    """Tell the verifier once; a lost Confirm costs the boot nothing and is sent again by the booted system."""
    limits = config.limits
    try:
        reply = exchange.post(
            answered.endpoint,
            messages.PATH_CONFIRM,
            answered.confirm(outcome),
            attempt_s=limits.attempt_s,
            connect_s=limits.connect_s,
            budget=Budget(limits.attempt_s),
        )
        message = messages.decode_confirm_reply(reply.body)
    except (NetworkError, PeerError) as error:
        say(f"{answered.endpoint.name}: has not taken the confirmation ({error.code})")
        return False
    return isinstance(message, messages.Receipt)


def _keep_confirm(answered: Answered, outcome: Outcome, say: Callable[[str], None]) -> None:
    if confirm.keep(answered.endpoint, answered.confirm(outcome), confirm.PATH):
        say(f"{answered.endpoint.name}: the booted system sends the confirmation again, from {confirm.PATH}")
