"""A verifier changes its key, and its VM, with the real agent, boots all the way through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from tests.desks import Desk
from tests.worlds import VM, Enrolled

from kagimori_agent import config as agent_config
from kagimori_agent.config import Config
from kagimori_agent.unlock import unlock
from kagimori_protocol.errors import NetworkError

pytestmark = pytest.mark.slow


@pytest.fixture
def desk(enrolled: Enrolled, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give the owner's command line, beside the verifier that serves."""
    return Desk(enrolled.owner.directory, capsys)


@contextmanager
def booted(enrolled: Enrolled, keys: list[bytes]) -> Iterator[Config]:
    """Start the VM with an agent.toml that pins these keys."""
    with enrolled.booted() as (_, config):
        (verifier,) = config.verifiers
        limits = msgspec.structs.replace(config.limits, boot_budget_s=2, attempt_s=1, connect_s=1)
        pinned = msgspec.structs.replace(verifier, keys=keys)
        yield msgspec.structs.replace(config, verifiers=[pinned], limits=limits)


def keys_of(desk: Desk) -> list[bytes]:
    """Read the keys in what `vm config` prints."""
    path = desk.directory / "agent.toml"
    path.write_text(desk.good("vm", "config", VM)["agent_toml"], encoding="utf-8")
    return agent_config.load(path).verifiers[0].keys


def boot(enrolled: Enrolled, keys: list[bytes]) -> bool:
    """Boot, with these keys pinned."""
    with booted(enrolled, keys) as config:
        return unlock(config, lambda _: None, prove=True).confirmed


def test_a_vm_boots_across_a_rotation(enrolled: Enrolled, desk: Desk) -> None:
    """Stage, boot by the old key, boot by the new one, activate, boot, retire; the old image is told what to do."""
    old = keys_of(desk)
    staged = desk.good("identity", "rotate")
    assert [vm["vm_id"] for vm in staged["lacking"]] == [VM]
    both = keys_of(desk)
    assert both[:1] == old
    assert len(both) == 2

    assert boot(enrolled, old), "the old image boots while the next key is staged"
    assert desk("--json", "identity", "activate").error == "identity.lacking"

    assert boot(enrolled, both)
    assert desk.good("identity", "show")["lacking"] == []
    assert desk.good("identity", "activate")["activated"] == staged["staged"]

    new = keys_of(desk)
    assert new == both[1:]
    assert boot(enrolled, both)
    assert boot(enrolled, new)
    assert boot(enrolled, old), "until it is retired, the old key answers who pins nothing newer"
    (previous,) = [
        row["key_id"] for row in desk.good("identity", "show")["keys"] if row["state"] == "previous"
    ]
    assert desk("--json", "identity", "retire", previous).error == "identity.lacking"

    assert boot(enrolled, new)
    desk.good("identity", "retire", previous)
    assert boot(enrolled, new)
    with booted(enrolled, old) as config, pytest.raises(NetworkError) as caught:
        unlock(config, lambda _: None, prove=True)
    told = str(caught.value.__cause__ or caught.value), caught.value.todo or ""
    assert "signed by a key that agent.toml does not name" in told[0]
    assert "rebuild the initramfs with the agent.toml of `kagimori-verifier vm config`" in told[1]
    assert enrolled.owner.events()[-1] == "confirmed-opened"


def test_the_ledger_tells_by_which_key_each_answer_was_given(enrolled: Enrolled, desk: Desk) -> None:
    """For the owner who wonders which images are about."""
    staged = desk.good("identity", "rotate")["staged"]
    assert boot(enrolled, keys_of(desk))
    (released,) = [one for one in enrolled.owner.ledger() if one.event == "released"]
    assert released.body["verifier_key"] == staged
