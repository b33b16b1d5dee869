"""One boot of a real VM: a real agent as a process, a real swtpm, a real report door, and a verifier that knows it."""

from __future__ import annotations

import contextlib
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.attacks.attacker import UNLOCK_KEY, UUID
from tests.faults import invariants
from tests.faults.guests import Guest, Opened
from tests.faults.programs import Launcher, Program
from tests.faults.tpm_proxy import TpmProxy
from tests.worlds import CHIP_ID, DIRECT, SVSM, VM, Owner

from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.vtpm import Vtpm
from kagimori_simulator.world import VerifierAt, VolumeAt, World

REFUSED = 1
"""Exit code of an agent that got a no."""
PATIENT_S = 60
"""How long a boot waits where its story is not about that: machines are busy."""
HARDWARE = 5
"""Exit code of an agent whose TPM or report door failed."""


@dataclass
class Boot:
    """A VM that has booted, and what it did. The verifier serves as long as the boot lasts."""

    launcher: Launcher
    guest: Guest
    owner: Owner
    world: World
    proxy: TpmProxy | None
    config: Path
    programs: list[Program] = field(default_factory=list)

    def give_time(self, seconds: int) -> None:
        """Let the boot wait so long for its key, and for each attempt at it."""
        text = re.sub(
            r"^(boot_budget|attempt)_s = \d+$",
            rf"\1_s = {seconds}",
            self.config.read_text(),
            flags=re.MULTILINE,
        )
        self.config.write_text(text)

    @property
    def vtpm(self) -> Vtpm:
        assert self.world.vtpm is not None
        return self.world.vtpm

    @property
    def tpm(self) -> TpmProxy:
        assert self.proxy is not None
        return self.proxy

    def start(self, verb: str, *options: str, **failpoints: Any) -> Program:  # noqa: ANN401 - the arguments of failpoints.arm
        """Start the agent; one that ran before has ended."""
        if self.proxy is not None:
            self.proxy.flush()
        program = self.launcher.start(
            "agent", verb, "--json", "--config", self.config, *options, **failpoints
        )
        self.programs.append(program)
        return program

    def unlock(self, **failpoints: Any) -> Program:  # noqa: ANN401 - as above
        """Run the agent as the initramfs does, to its end."""
        program = self.start("unlock", "--prove", **failpoints)
        program.wait()
        return program

    def cap(self) -> None:
        """Cap as the unit does that comes after the agent, whatever became of it; and look at the TPM itself."""
        done = self.start("cap")
        assert done.wait() == 0, done.stderr.read_text()
        invariants.the_boot_is_capped(self.vtpm)

    def nothing_more_is_released(self) -> None:
        """Whoever runs the agent again in this boot gets a no."""
        before = len(invariants.lines(self.owner.directory, "released"))
        again = self.unlock()
        assert again.code == REFUSED, again.stderr.read_text()
        assert len(invariants.lines(self.owner.directory, "released")) == before
        invariants.the_boot_is_capped(self.vtpm)

    def next_boot(self) -> Opened:
        """Let the VM boot again, honestly, and hold what must be true of its owner's side."""
        told = self.guest.release(self.owner.url, self.guest.evidence(self.owner.url))
        opened = self.guest.open(told)
        self.guest.confirm(self.owner.url, self.guest.confirmation(told))
        directory = self.owner.directory
        invariants.nothing_is_released_that_the_ledger_lacks(directory, [opened])
        invariants.nothing_is_released_twice(directory, [opened])
        invariants.opened_is_recorded_once(directory, opened.session)
        self.owner.ledger()
        return opened


@contextlib.contextmanager
def booted(launcher: Launcher, guest: Guest, root: AmdRoot, image: Path, directory: Path) -> Iterator[Boot]:
    """Boot the VM; when the story is over, look for its key in all that it left, and for what it should have told."""
    svsm = guest.kind == "svsm-vtpm"
    machine = SnpMachine(
        root, chip_id=CHIP_ID, svsm=svsm, measurement=SVSM if svsm else DIRECT, report_version=3
    )
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(Owner.opened(guest.copy(directory / "verifier"), root))
        url = stack.enter_context(owner.served())
        world = stack.enter_context(World.running(directory / "vm", machine))
        at = VerifierAt("home", [url], [b64encode(owner.public_key).decode()])
        config = world.agent_toml(VM, [at], [VolumeAt(UUID, "cryptroot", image)])
        proxy = None
        if world.vtpm is not None:
            proxy = stack.enter_context(TpmProxy.before(world.vtpm))
            config.write_text(config.read_text().replace(world.vtpm.tcti, proxy.tcti))
        boot = Boot(launcher, guest, owner, world, proxy, config)
        boot.give_time(PATIENT_S)
        stack.callback(_end_all, boot)
        yield boot
    printed = [path for program in boot.programs for path in (program.stdout, program.stderr)]
    invariants.no_traceback(*printed)
    invariants.no_file_holds_the_key(UNLOCK_KEY, directory, *printed)


def _end_all(boot: Boot) -> None:
    for program in boot.programs:
        program.end()
