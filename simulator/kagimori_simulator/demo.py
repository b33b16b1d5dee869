"""The whole job on one machine: an honest boot gets its key, and boots that matter do not.

Everything but the hardware is the real thing: the verifier is a process with its database, the agent is a process that
opens devices, the disk is LUKS2. The hardware is this room's: chip, SVSM and vTPM really sign, under a root that is not
AMD's and that the verifier meets because this demo, as its operator, adds it by name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_agent.luks import has_device_mapper
from kagimori_protocol import messages, transcript
from kagimori_protocol.errors import KagimoriError
from kagimori_simulator import disk, faults, measured_boot, pe, stage
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.commands import Commands, ServedVerifier
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.vtpm import Vtpm
from kagimori_simulator.wire import Wire
from kagimori_simulator.world import VerifierAt, VolumeAt, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kagimori_simulator.event_log import MeasuredBoot
    from kagimori_simulator.stage import Stage

VM: Final = "web1"
PROFILE: Final = "debian-grub"
VOLUME: Final = "cryptroot"
FLOOR: Final = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"
SVSM_MEASUREMENT: Final = bytes.fromhex("c0c0") * 24


@dataclasses.dataclass
class Demo:
    """The state of a demo: one verifier, one VM's disk, one chip."""

    stage: Stage
    directory: Path
    root: AmdRoot
    commands: Commands
    verifier: ServedVerifier
    volume: VolumeAt
    chip_id: bytes
    refusals: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def machine(self) -> SnpMachine:
        """Start the VM anew on the same chip."""
        return SnpMachine(
            self.root, chip_id=self.chip_id, measurement=SVSM_MEASUREMENT, svsm=True, report_version=3
        )

    @contextlib.contextmanager
    def vm(
        self, boot: MeasuredBoot | None = None, lie: Callable[[SnpMachine], None] | None = None
    ) -> Iterator[World]:
        """Boot the VM, with another boot or on a machine that lies."""
        machine = self.machine()
        if lie is not None:
            lie(machine)
        with World.running(self.directory / f"vm-{secrets.token_hex(4)}", machine, boot) as world:
            at = VerifierAt("home", [self.verifier.url], [self.verifier.public_key])
            world.agent_toml(VM, [at], [self.volume])
            yield world

    def attack(self, title: str, world: World) -> None:
        """Let the agent ask, expect a refusal, and show it from both sides."""
        done = self.commands.agent(world, "unlock", "--json", *self.prove(), may_fail=True)
        if done.code == 0:
            self.refused(title, "the keys", [])
        self.refused(title, done.told(), self.commands.explain(done.session()))

    def refused(self, title: str, told: str, checks: Sequence[dict[str, Any]]) -> None:
        """Write a refusal down. A demo whose attack succeeds is a failed demo."""
        failed = [check for check in checks if not check["ok"]]
        if not failed:
            raise KagimoriError(
                f"The attack was not refused: {title}.",
                code="demo.not-refused",
                expected="a refusal",
                found=told,
            )
        self.stage.refusal(title, told, failed)
        self.refusals.append({"attack": title, "told": told, "failed": failed})

    @staticmethod
    def prove() -> tuple[str, ...]:
        """Where the kernel has no device-mapper, ask the agent to prove the key instead of mapping the volume."""
        return () if has_device_mapper() else ("--prove",)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="kagimori-demo",
        description="Show the whole job on this machine: attest, appraise, release, unlock, and refusals that matter.",
        epilog="exit codes: 0 all went as it should; otherwise the code of what did not",
    )
    made.add_argument(
        "--json", action="store_true", help="print one JSON object at the end, and nothing else"
    )
    made.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in a new directory and keep it, to look around"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = parser().parse_args(arguments)
    told = stage.choose(as_json=options.json)
    try:
        with _directory(options.keep) as directory:
            told.end(_play(told, directory))
        sys.stdout.flush()
    except KagimoriError as error:
        print(f"kagimori-demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="kagimori-demo-") as temporary:
        yield Path(temporary)


def _play(told: Stage, directory: Path) -> dict[str, Any]:
    told.act("The owner starts a verifier")
    commands = Commands(directory)
    with told.step("a chip is made that signs like AMD's, under a root of its own"):
        root, chip_id = AmdRoot.create("Milan"), secrets.token_bytes(64)
    with told.step("kagimori-verifier init: SQLite database, key-encryption key, identity"):
        commands.verifier("init", "--dir", str(directory / "verifier"), "--listen", "127.0.0.1:0")
    volume = _enrol(told, commands, directory, root, chip_id)
    with commands.serving() as verifier:
        demo = Demo(told, directory, root, commands, verifier, volume, chip_id)
        opened = _honest_boot(demo)
        _refusals(demo)
    commands.verifier("ledger", "verify")
    return opened | {"refusals": demo.refusals, "directory": str(directory)}


def _enrol(told: Stage, commands: Commands, directory: Path, root: AmdRoot, chip_id: bytes) -> VolumeAt:
    """Tell the verifier what is good, and give the disk a keyslot of its own."""
    with told.step(
        "its operator adds the simulated root by name, and imports certificates and revocation list"
    ):
        for name, content in (("ark", root.ark_der), ("ask", root.ask_der), ("crl", root.crl())):
            (directory / f"{name}.der").write_bytes(content)
        ark = str(directory / "ark.der")
        commands.verifier("endorsements", "root", "add", "--certificate", ark, "--label", "simulated")
        commands.verifier(
            "endorsements", "import", *(str(directory / f"{name}.der") for name in ("ark", "ask", "crl"))
        )
    with told.step(f"profile {PROFILE}: firmware floor, boot through GRUB, one SVSM build"):
        commands.verifier("profile", "add", PROFILE, "--boot-way", "grub", "--tcb-floor", FLOOR)
        commands.verifier(
            *("reference", "measurement", "add", SVSM_MEASUREMENT.hex(), "--profile", PROFILE),
            *("--kind", "svsm-vtpm", "--label", "svsm 2026.10", "--svsm-feature", "vtpm"),
        )
    with told.step(
        f"VM {VM} may run on one chip; its LUKS2 volume gets a keyslot for the verifier's unlock key"
    ):
        commands.verifier("vm", "add", VM, "--profile", PROFILE, "--chip", chip_id.hex())
        image, passphrase = directory / "disk.img", secrets.token_hex(16)
        uuid = disk.make_volume(image, passphrase.encode())
        commands.verifier(
            *("volume", "add", "--vm", VM, "--device", str(image), "--name", VOLUME, "--passphrase-fd", "0"),
            stdin=passphrase,
        )
    return VolumeAt(uuid, VOLUME, image)


def _honest_boot(demo: Demo) -> dict[str, Any]:
    """Ask first, accept what was seen, then unlock."""
    told = demo.stage
    told.act("The VM boots: chip, SVSM, vTPM, firmware, GRUB, kernel, initramfs, agent")
    with demo.vm() as world:
        with told.step("kagimori-agent dry-run: the verifier has no reference values yet, and says so"):
            asked = demo.commands.agent(world, "dry-run", "--json", may_fail=True).json()
        with told.step(
            "the owner looks at what the VM showed and accepts it: kagimori-verifier reference accept"
        ):
            demo.commands.verifier("reference", "accept", asked["session"], "--yes", "--label", "first boot")
        with told.step("kagimori-agent unlock"):
            unlocked = demo.commands.agent(world, "unlock", "--json", *demo.prove()).json()
        checks = demo.commands.explain(unlocked["session"])
        told.checks(checks)
        how = unlocked["volumes"][0]["how"]
        if how == "mapped":
            told.say(f"{VOLUME} is open, and this boot is capped")
            _close(VOLUME)
        else:
            told.say(f"this kernel has no device-mapper: the key was proved on {VOLUME}, nothing was mapped")
            told.say("this boot is capped")
        told.act("Whoever comes later in the same boot, or changes anything, gets nothing")
        demo.attack("root of the booted VM asks again", world)
        return {"volume": how, "session": unlocked["session"], "checks": checks}


def _refusals(demo: Demo) -> None:
    """Attacks that matter; each runs the same agent against the same verifier."""
    other_kernel = pe.image({".text": b"a kernel with a back door"})
    with demo.vm(measured_boot.grub(kernel=other_kernel)) as world:
        demo.attack("another kernel", world)
    with demo.vm(lie=faults.another_measurement) as world:
        demo.attack("another SVSM measurement", world)
    with demo.vm(lie=faults.debug_policy) as world:
        demo.attack("a guest that its host may debug", world)
    with demo.vm() as world, Vtpm.start(world.directory / "other-tpm") as other:
        _replay_and_forge(demo, world, other)


def _replay_and_forge(demo: Demo, world: World, other: Vtpm) -> None:
    """Record an honest run on the wire, then play it again, and play it with another TPM's key."""
    saved = world.directory / "recorded"
    demo.commands.agent(world, "dry-run", "--save", str(saved), may_fail=True)
    hello, evidence = ((saved / f"{name}.json").read_bytes() for name in ("hello", "evidence"))
    wire = Wire(demo.verifier.url)
    for title, changes in (
        ("a recorded run, played again for a new challenge", {}),
        ("a forged EK: the manifest names the attacker's TPM", {"manifest": other.ek_public()}),
    ):
        denial = wire.replay(hello, evidence, fresh=not changes, **changes)
        if not isinstance(denial, messages.Denial):
            demo.refused(title, "an answer", [])
            continue
        checks = demo.commands.explain(transcript.session_id(denial.session))
        demo.refused(title, f"denied: {denial.code}", checks)


def _close(name: str) -> None:
    subprocess.run(["cryptsetup", "close", name], check=True, timeout=30)


if __name__ == "__main__":
    sys.exit(main())
