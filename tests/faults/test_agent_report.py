"""The report door stalls, fails, answers late, or gives half of an answer: the boot ends capped, the next one gets the key."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.faults import invariants
from tests.faults.boots import HARDWARE, REFUSED, Boot
from tests.faults.programs import WAIT_S

from kagimori_simulator.configfs import ReportItem

pytestmark = pytest.mark.slow  # a boot per case

READ = ("provider", "generation", "outblob", "manifestblob", "auxblob")
WRITTEN = ("service_provider", "service_guid", "service_manifest_version", "inblob")
ERRORS = (errno.EIO, errno.ETIMEDOUT, errno.ENOTTY)
"""A broken host, one that throttles for a minute, a guest whose key Linux has given up."""
BLOBS = ("report", "manifest", "certificates")
SHORT_BUDGET_S = 2


def _ends_without_a_key(boot: Boot, code: int = HARDWARE) -> None:
    """Hold what is true of a boot whose report door failed."""
    done = boot.unlock()
    assert done.code == code, done.stderr.read_text()
    assert done.json["error"]["todo"]
    invariants.the_boot_is_capped(boot.vtpm)
    assert boot.owner.events() == [], "nothing was decided"
    boot.world.tsm.failures.clear()
    boot.world.tsm.after_show = None
    boot.next_boot()


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("attribute", [*READ, *WRITTEN])
def test_a_door_that_fails_at_any_attribute_ends_in_a_capped_boot(
    boot: Boot, attribute: str, error: int
) -> None:
    """Each open, read and write of the request may be the one; an error of inblob's close reaches nobody but the count."""
    boot.world.tsm.failures[attribute] = error
    _ends_without_a_key(boot)


@pytest.mark.parametrize("after", READ)
def test_a_driver_that_goes_in_the_middle_ends_in_a_capped_boot(boot: Boot, after: str) -> None:
    """Its module is unloaded while the request is on its way; after the last read nothing is left to fail but the goodbye."""

    def goes(_item: ReportItem, name: str) -> None:
        if name == after:
            boot.world.tsm.provider = None

    boot.world.tsm.after_show = goes
    done = boot.unlock()
    assert done.code in {0, HARDWARE}
    invariants.the_boot_is_capped(boot.vtpm)
    assert boot.owner.events() == (["released", "confirmed-opened"] if done.code == 0 else [])
    if done.code:
        boot.next_boot()


@pytest.mark.parametrize("missing", [1, 100])
@pytest.mark.parametrize("blob", BLOBS)
def test_an_answer_that_is_cut_ends_in_a_capped_boot(boot: Boot, blob: str, missing: int) -> None:
    """The host, or a broken SVSM, gives less than the whole: refused here, or by the verifier, and never filled up."""
    svsm = boot.world.svsm
    assert svsm is not None
    attest: Callable[..., tuple[bytes, bytes, bytes]] = svsm.attest_single_service

    def cut(*arguments: Any) -> tuple[bytes, ...]:  # noqa: ANN401 - attest_single_service's
        parts = dict(zip(BLOBS, attest(*arguments), strict=True))
        parts[blob] = parts[blob].rstrip(b"\x00")[:-missing]
        return tuple(parts.values())

    svsm.attest_single_service = cut  # type: ignore[method-assign,assignment]  # the SVSM of this boot only
    _ends_without_a_key(boot, REFUSED if blob == "certificates" else HARDWARE)


@pytest.fixture
def stalled(boot: Boot, request: pytest.FixtureRequest) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Let the door hold back what is read of one attribute: the first event tells of it, the second lets go."""
    reached, go_on = threading.Event(), threading.Event()

    def stall(_item: ReportItem, name: str) -> None:
        if name == request.param:
            reached.set()
            go_on.wait(WAIT_S)

    boot.world.tsm.after_show = stall
    yield reached, go_on
    go_on.set()


@pytest.mark.parametrize("stalled", READ, indirect=True)
def test_a_door_that_answers_late_only_costs_time(
    boot: Boot, stalled: tuple[threading.Event, threading.Event]
) -> None:
    """The host throttles, within the time that the boot has."""
    reached, go_on = stalled
    agent = boot.start("unlock", "--prove")
    assert reached.wait(WAIT_S)
    go_on.set()
    assert agent.wait() == 0, agent.stderr.read_text()
    invariants.the_boot_is_capped(boot.vtpm)
    assert boot.owner.events() == ["released", "confirmed-opened"]


@pytest.mark.parametrize("stalled", READ, indirect=True)
def test_a_door_that_never_answers_ends_in_a_capped_boot(
    boot: Boot, stalled: tuple[threading.Event, threading.Event]
) -> None:
    """When the boot's time is over the agent caps and says so, though its request can never be called back.

    The kernel holds the end of its process until the door has answered, and nothing can be done about that.
    """
    reached, go_on = stalled
    boot.give_time(SHORT_BUDGET_S)
    agent = boot.start("unlock", "--prove")
    assert reached.wait(WAIT_S)
    assert agent.told()["error"]["code"] == "report.stalled"
    invariants.the_boot_is_capped(boot.vtpm)
    assert boot.owner.events() == []
    go_on.set()
    assert agent.wait() == HARDWARE
    boot.next_boot()
