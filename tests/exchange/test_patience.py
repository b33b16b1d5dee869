"""A verifier that is merely away costs time: the boot may wait without end, and the booted system confirms afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.attacks.hosts import Reply
from tests.attacks.test_hosts_that_answer import host_between

from kagimori_agent import cli, confirm
from kagimori_agent.config import Boot, Config
from kagimori_agent.unlock import unlock
from kagimori_protocol import messages
from kagimori_protocol.errors import NetworkError

if TYPE_CHECKING:
    from tests.worlds import Enrolled

pytestmark = pytest.mark.slow  # the quick suite has three minutes

AWAY: Reply = (502, b"", None)


def _impatient(config: Config, wait: str) -> Config:
    limits = msgspec.structs.replace(
        config.limits, boot_budget_s=1, attempt_s=1, connect_s=1, backoff_min_s=0.2, backoff_max_s=0.2
    )
    return msgspec.structs.replace(config, limits=limits, boot=Boot(wait=wait))  # type: ignore[arg-type]  # a Literal


@pytest.mark.parametrize("wait", ["budget", "forever"])
def test_who_waits_forever_gets_the_key_when_the_verifier_is_back(enrolled: Enrolled, wait: str) -> None:
    """The budget is over after a second; the verifier comes after three."""
    back = time.monotonic() + 3

    def away(_path: str, _body: bytes, ask: Callable[[], Reply]) -> Reply:
        return ask() if time.monotonic() > back else AWAY

    said: list[str] = []
    with (
        host_between(enrolled.owner.url, away) as url,
        enrolled.booted(verifiers=[enrolled.verifier(url)]) as (_, config),
    ):
        if wait == "budget":
            with pytest.raises(NetworkError, match="time that a boot may wait"):
                unlock(_impatient(config, wait), said.append, prove=True)
            return
        # As many attempts as it takes, each with the time that a loaded machine needs.
        patient = msgspec.structs.replace(_impatient(config, wait).limits, attempt_s=20)
        unlocked = unlock(
            msgspec.structs.replace(_impatient(config, wait), limits=patient), said.append, prove=True
        )
    assert time.monotonic() > back
    assert unlocked.volumes
    assert any("(without end)" in line for line in said), said


def test_a_confirm_that_got_lost_is_sent_again_by_the_booted_system(
    enrolled: Enrolled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the owner's ledger says "released" of a machine that runs."""
    (tmp_path / "run").mkdir()
    kept = tmp_path / "run/confirm"
    monkeypatch.setattr(confirm, "PATH", kept)
    lost: list[str] = []

    def deaf(path: str, _body: bytes, ask: Callable[[], Reply]) -> Reply:
        if path == messages.PATH_CONFIRM and len(lost) < 3:
            lost.append(path)
            return AWAY
        return ask()

    said: list[str] = []
    with (
        host_between(enrolled.owner.url, deaf) as url,
        enrolled.booted(verifiers=[enrolled.verifier(url)]) as (_, config),
    ):
        unlocked = unlock(config, said.append, prove=True)
        assert not unlocked.confirmed
        assert enrolled.owner.events() == ["released"]
        assert kept.stat().st_mode & 0o777 == 0o600
        monkeypatch.setattr(confirm, "BACKOFF_MIN_S", 0.1)
        assert cli.main(["confirm"]) == 0
    assert capsys.readouterr().out.endswith("home: has taken the confirmation\n")
    assert enrolled.owner.events() == ["released", "confirmed-opened"]
    assert list(kept.parent.iterdir()) == []
    assert cli.main(["confirm"]) == 0, "nothing is left to do"
    assert enrolled.owner.events() == ["released", "confirmed-opened"]
