"""The agent of a story: the real one from ``attest`` on. Only its line ends in this process, at a host between the two."""

from __future__ import annotations

import contextlib
import time
from base64 import b64encode
from collections.abc import Iterator
from typing import Final

import pytest
from tests.attacks.bite.story import Scene, Stopped
from tests.attacks.hosts import Middle, Reply
from tests.worlds import VM

from kagimori_agent import config, exchange, unlock
from kagimori_agent.attempt import Answered, attest
from kagimori_agent.budget import Budget
from kagimori_agent.collect import SvsmVtpm
from kagimori_agent.config import Config
from kagimori_agent.devices.configfs_tsm import ServiceReport
from kagimori_agent.exchange import Endpoint
from kagimori_agent.line import Received, Request
from kagimori_protocol import messages
from kagimori_protocol.errors import KagimoriError, NetworkError
from kagimori_simulator.svsm import VTPM_SERVICE, Svsm

URL: Final = "http://192.0.2.1"
BUDGET_S: Final = 60.0
"""More than a busy machine takes; a boot that does not believe its verifier finds it spent at once (``attested``)."""


class Door:
    """The report door of a VM below an SVSM, without a kernel in front of it."""

    def __init__(self, svsm: Svsm) -> None:
        self.svsm = svsm

    def service_report(self, nonce: bytes, _service: str) -> ServiceReport:
        return ServiceReport(*self.svsm.attest_single_service(nonce, VTPM_SERVICE))


def agent_toml(scene: Scene, uuid: str) -> Config:
    """Configure the agent of the VM: its verifier's key is what counts, the URL is the host's."""
    path = scene.office.directory / "agent.toml"
    path.write_text(
        f'vm_id = "{VM}"\nkind = "svsm-vtpm"\n[[verifiers]]\nname = "home"\nurls = ["{URL}"]\n'
        f'keys = ["{b64encode(scene.office.public_key).decode()}"]\n'
        f'[[volumes]]\nuuid = "{uuid}"\nname = "cryptroot"\ndevice = "/dev/vda"\n'
        "[limits]\nboot_budget_s = 60\nattempt_s = 60\ngather_s = 0\n"
        "backoff_min_s = 0.01\nbackoff_max_s = 0.01\n"
    )
    return config.load(path)


def attested(scene: Scene, settings: Config, middle: Middle, cap_pcr: int = 15) -> Answered:
    """Let the VM's agent attest for ``unlock`` through a host; raises Stopped by what the agent complained of."""
    assert scene.stand is not None
    attester = SvsmVtpm(Door(scene.monitor), scene.stand.vtpm, cap_pcr)  # type: ignore[arg-type]  # all of a door that is used
    with host_on_the_line(scene, middle) as unbelieved:
        budget = Budget(BUDGET_S, lambda: time.monotonic() + (2 * BUDGET_S if unbelieved else 0))
        try:
            return attest(settings, attester, "unlock", budget, lambda _: None)
        except NetworkError as error:  # it has waited for an answer, and given up
            raise Stopped(*unbelieved) from error
        except KagimoriError as error:
            denied = error.code.startswith("denied.")
            raise Stopped(scene.office.refusals()[0].code if denied else error.code) from error


def confirmed(scene: Scene, settings: Config, answered: Answered, middle: Middle) -> None:
    """Let the agent confirm that its volumes are open; raises Stopped if it knows that nobody has taken that."""
    with host_on_the_line(scene, middle) as unbelieved:
        if not unlock.send_confirm(settings, answered, "opened", lambda _: None):
            raise Stopped(*unbelieved)


@contextlib.contextmanager
def host_on_the_line(scene: Scene, middle: Middle) -> Iterator[set[str]]:
    """Put a host between the agent and the verifier; gives the names by which the agent does not believe replies."""
    unbelieved: set[str] = set()
    believe = exchange._verified

    def verified(endpoint: Endpoint, url: str, request: bytes, received: Received) -> exchange.Reply:
        try:
            return believe(endpoint, url, request, received)
        except NetworkError as error:
            unbelieved.add(getattr(error.__cause__, "code", error.code))
            raise

    service = scene.office.verifier.service
    doors = {
        messages.PATH_CHALLENGE: service.challenge,
        messages.PATH_RELEASE: service.release,
        messages.PATH_CONFIRM: service.confirm,
    }

    class Line:
        def __init__(self, _limit_s: float) -> None:
            """Take whatever time there is."""

        def ask(self, request: Request) -> Received:
            path = request.url.removeprefix(URL)

            def ask() -> Reply:
                reply = doors[path](request.body, "192.0.2.1")
                return reply.status, reply.body, reply.signature

            status, body, signed = middle(path, request.body, ask)
            return Received(status, signed, body)

        def hang_up(self) -> None:
            """There is nothing to hang up."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "Line", Line)
        patch.setattr(exchange, "_verified", verified)
        yield unbelieved
