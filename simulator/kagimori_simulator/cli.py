"""A simulated SNP machine for a laptop: make one, then boot it and run the agent in it, honestly or with a lie.

``init`` makes a chip and its root; ``run`` boots the VM, prepares the agent.toml that the owner's verifier printed, and runs
one verb of the real agent, or of another one. Every run is a new boot, of the kind that agent.toml names.
"""

from __future__ import annotations

import argparse
import inspect
import secrets
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import KagimoriError, UsageError
from kagimori_simulator import faults, measured_boot, pe
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.world import DOORS, VerifierAt, VolumeAt, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kagimori_simulator.event_log import MeasuredBoot
    from kagimori_simulator.sev_guest import SevGuest

NAME: Final = "kagimori-simulator"
MEASUREMENT: Final = bytes.fromhex("c0c0") * 24
_FILES: Final = ("ark.der", "ask.der", "crl.der")
_PARTS: Final = ("kernel", "initramfs", "cmdline")
"""Parts of a measured boot that can be another."""


def lies() -> dict[str, Callable[[SnpMachine], None]]:
    """Give the named lies that a machine can tell, by the names of the command line."""
    functions = inspect.getmembers(faults, inspect.isfunction)
    return {
        name.replace("_", "-"): function
        for name, function in functions
        if list(inspect.signature(function).parameters) == ["machine"]
        and function.__module__ == faults.__name__
    }


def driver_lies() -> dict[str, Callable[[SevGuest], object]]:
    """Give the named lies that a host can tell the guest's driver, by the names of the command line."""
    functions = inspect.getmembers(faults, inspect.isfunction)
    return {
        name.replace("_", "-"): function
        for name, function in functions
        if next(iter(inspect.signature(function).parameters)) == "driver"
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: the agent's, for ``run``."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except KagimoriError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description="A simulated SEV-SNP machine, under a root that is not AMD's."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    init = verbs.add_parser(
        "init", help="make a chip and its root", description="Make a chip, its root, and its certificates."
    )
    init.add_argument("--dir", type=Path, required=True, metavar="DIR", help="a new directory")
    init.set_defaults(run=_init)
    run = verbs.add_parser(
        "run",
        help="boot the VM and run a verb of the agent in it",
        description="Boot the VM of the kind that FILE names (svsm-vtpm: through GRUB below an SVSM; snp-direct: with "
        "everything in its measurement), and run one verb of the agent in it.",
        epilog="lies: " + ", ".join([*lies(), *driver_lies()]),
    )
    run.add_argument("--dir", type=Path, required=True, metavar="DIR", help="what `init` made")
    run.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="what `kagimori-verifier vm config` printed",
    )
    run.add_argument(
        "--disk", type=Path, metavar="IMAGE", help="the LUKS2 image that stands for the VM's disk"
    )
    for part in _PARTS:
        run.add_argument(f"--{part}", metavar="TEXT", help=f"boot with another {part}, made of this text")
    run.add_argument(
        "--program",
        type=Path,
        metavar="PROGRAM",
        help="run this agent in place of ours, as: PROGRAM VERB --config FILE ...",
    )
    run.add_argument(
        "--door",
        action="append",
        choices=DOORS,
        help="a report door that the VM's kernel has (may be repeated; default: configfs-tsm)",
    )
    run.add_argument(
        "--lie",
        action="append",
        default=[],
        choices=[*lies(), *driver_lies()],
        metavar="NAME",
        help="let the machine lie; see below",
    )
    run.add_argument(
        "agent",
        nargs=argparse.REMAINDER,
        metavar="VERB ...",
        help="unlock, dry-run, enrol, doctor or cap, and its options",
    )
    run.set_defaults(run=_run)
    return parser


def _init(options: argparse.Namespace) -> int:
    directory: Path = options.dir
    if directory.exists():
        raise UsageError(f"{directory} exists already.", expected="a new directory", found=str(directory))
    endorsements = directory / "endorsements"
    endorsements.mkdir(parents=True)
    root = AmdRoot.create("Milan")
    root.save(directory / "root")
    for name, content in zip(_FILES, (root.ark_der, root.ask_der, root.crl()), strict=True):
        (endorsements / name).write_bytes(content)
    chip_id = secrets.token_bytes(64)
    (directory / "chip-id").write_text(chip_id.hex() + "\n", encoding="ascii")
    (directory / "measurement").write_text(MEASUREMENT.hex() + "\n", encoding="ascii")
    print(f"made a chip in {directory}: chip-id, measurement, endorsements/ark.der, ask.der, crl.der")
    return 0


def _run(options: argparse.Namespace) -> int:
    if not options.agent:
        raise UsageError("No verb for the agent.", expected="unlock, dry-run, doctor or cap", found="nothing")
    verb, *rest = options.agent
    agent = [sys.executable, "-m", "kagimori_agent"]
    if options.program is not None:
        agent = [str(options.program.absolute())]
    caller = Path.cwd()  # libfuse moves this process to the root directory
    try:
        root = AmdRoot.load(options.dir / "root")
        chip_id = bytes.fromhex((options.dir / "chip-id").read_text(encoding="ascii"))
        config = tomllib.loads(options.config.read_text(encoding="utf-8"))
        verifiers = [VerifierAt(one["name"], one["urls"], one["keys"]) for one in config["verifiers"]]
        vm_id, volumes = config["vm_id"], _volumes(config, options.disk)
        svsm = config.get("kind") != "snp-direct"
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            "The simulated machine or the agent's configuration cannot be read.",
            expected="what `kagimori-simulator init` and `kagimori-verifier vm config` made",
            found=str(error),
        ) from error
    if not svsm and (changed := [part for part in _PARTS if getattr(options, part) is not None]):
        raise UsageError(
            "A VM of kind snp-direct has no measured boot.",
            expected="no " + ", ".join(f"--{part}" for part in changed),
            found="what its measurement covers",
            todo="Use --lie another-measurement.",
        )
    machine = SnpMachine(root, chip_id=chip_id, measurement=MEASUREMENT, svsm=svsm, report_version=3)
    machine_lies, told_to_driver = lies(), driver_lies()
    for name in options.lie:
        if name in machine_lies:
            machine_lies[name](machine)
    with (
        tempfile.TemporaryDirectory(prefix="kagimori-vm-") as directory,
        World.running(Path(directory), machine, _boot(options), options.door or DOORS[:1]) as world,
    ):
        for name in options.lie:
            if name in told_to_driver:
                told_to_driver[name](world.tsm.driver)
        path = world.agent_toml(vm_id, verifiers, volumes)
        return _run_agent([*agent, verb, "--config", str(path), *rest], caller)


def _run_agent(command: Sequence[str], directory: Path) -> int:
    try:
        # Descriptors that the caller has opened for the agent (--code-fd, --passphrase-fd) are its to read.
        return subprocess.run(command, check=False, cwd=directory, close_fds=False).returncode
    except OSError as error:
        raise UsageError(
            "The agent cannot be run.",
            expected="a program that can be executed",
            found=f"{command[0]}: {error.strerror}",
        ) from error


def _boot(options: argparse.Namespace) -> MeasuredBoot:
    parts: dict[str, Any] = {}
    if options.kernel is not None:
        parts["kernel"] = pe.image({".text": options.kernel.encode()})
    if options.initramfs is not None:
        parts["initramfs"] = options.initramfs.encode()
    if options.cmdline is not None:
        parts["cmdline"] = options.cmdline
    return measured_boot.grub(**parts)


def _volumes(config: dict[str, Any], disk: Path | None) -> list[VolumeAt]:
    volumes = config.get("volumes", [])
    if volumes and disk is None:
        raise UsageError("The VM has a volume, but no disk.", expected="--disk IMAGE", found="nothing")
    return [VolumeAt(one["uuid"], one["name"], (disk or Path()).resolve()) for one in volumes]


if __name__ == "__main__":
    sys.exit(main())
