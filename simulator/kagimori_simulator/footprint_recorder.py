"""Record what the agent loads, by exercising it: unlocks and refusals of both kinds, a dry-run, a cap, a doctor.

Imports alone would miss what is loaded late, such as codecs, and what the TPM library opens by itself. The record is
``agent/kagimori_agent/footprint.json``; ``python -m kagimori_simulator.footprint_recorder`` writes it anew when a package is
built or a dependency changes, and a test records again and compares.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kagimori_agent import footprint_record
from kagimori_agent.footprint_modules import OWN_PACKAGES, find
from kagimori_protocol.errors import KagimoriError
from kagimori_simulator import disk
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.commands import Commands
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.world import VerifierAt, VolumeAt, World

PROBE: Final = Path(__file__).with_name("footprint_probe.py")
_FLOOR: Final = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"
_TIMEOUT_S: Final = 120
_SVSM: Final = b"\xc0" * 48
_DIRECT: Final = b"\xd1" * 48

# What the record leaves out: the probe itself, what starts it, and what a machine's owner adds to every Python.
_NOT_OURS: Final = frozenset({"__main__", "sitecustomize", "usercustomize", "apport_python_hook", "runpy"})


@dataclass
class Loaded:
    """What all runs together have loaded."""

    modules: set[str] = field(default_factory=set)
    opened: set[Path] = field(default_factory=set)
    mapped: set[Path] = field(default_factory=set)


def record() -> Loaded:
    """Exercise the agent and tell what it loaded. Raises KagimoriError where an exercise ends otherwise than it must."""
    loaded = Loaded()
    with tempfile.TemporaryDirectory(prefix="kagimori-footprint-") as directory:
        _exercise(Path(directory), loaded)
    return loaded


def as_record(loaded: Loaded, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Give the record's content: ``before`` keeps what was recorded with other versions of Python."""
    may_load = _needed_distributions()
    ours = {name for name in loaded.modules if _is_recorded(name, may_load)}
    stdlib = sorted(name for name in ours if name.partition(".")[0] in sys.stdlib_module_names)
    packages = sorted(ours - set(stdlib))
    kept = dict((before or {}).get("stdlib", {}))
    kept[footprint_record.this_python()] = stdlib
    return {
        "packages": packages,
        "data": sorted(_data(packages, loaded.opened)),
        "stdlib": dict(sorted(kept.items())),
    }


def _is_recorded(name: str, needed: frozenset[str]) -> bool:
    """Tell whether a module is one that the agent needs wherever it runs, and not its own: all of those are taken.

    Not what a program made up at run time (no import finds it), and not what is here only because this environment has
    more than the agent depends on, which packages then use.
    """
    top = name.partition(".")[0]
    if top in _NOT_OURS or top in OWN_PACKAGES:
        return False
    return (top in sys.stdlib_module_names or top in needed) and find(name) is not None


def _needed_distributions() -> frozenset[str]:
    """Name the top-level modules of every distribution that ``kagimori[agent]`` depends on."""
    waiting, seen = ["kagimori"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for text in metadata.requires(name) or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": "agent" if name == "kagimori" else ""}):
                waiting += {canonicalize_name(need.name)} - seen
    owners = metadata.packages_distributions()
    return frozenset(top for top, names in owners.items() if seen & set(map(canonicalize_name, names)))


def _data(packages: Iterable[str], opened: Iterable[Path]) -> Iterator[str]:
    """Name the files that are no modules and lie in a package: ``certifi:cacert.pem``."""
    specs = {name: find_spec(name) for name in packages if "." not in name}
    places = {
        name: Path(spec.origin).parent for name, spec in specs.items() if spec and spec.origin and spec.parent
    }
    for path in opened:
        for name, place in places.items():
            if path.is_relative_to(place) and path.suffix not in {".py", ".pyc", ".so"}:
                yield f"{name}:{path.relative_to(place)}"


def _exercise(directory: Path, loaded: Loaded) -> None:
    commands = Commands(directory)
    root, chip_id = AmdRoot.create("Milan"), secrets.token_bytes(64)
    commands.verifier("init", "--dir", str(directory / "verifier"), "--listen", "127.0.0.1:0")
    volume = _enrol(commands, directory, root, chip_id)
    with commands.serving() as served:
        at = [
            VerifierAt("home", [served.url], [served.public_key]),
            VerifierAt("nobody", ["https://localhost:9"], [_other_key()]),
        ]
        for vm, svsm in (("svsm", True), ("direct", False)):
            machine = SnpMachine(
                root, chip_id=chip_id, measurement=_SVSM if svsm else _DIRECT, svsm=svsm, report_version=3
            )
            with World.running(directory / vm, machine) as world:
                config = world.agent_toml(vm, at, [volume])
                probed = _Probed(config, loaded)
                if svsm:
                    asked = probed.run("dry-run", "--json", "--save", str(directory / "saved"), code=1)
                    commands.verifier("reference", "accept", asked["session"], "--yes", "--label", "recorded")
                probed.run("dry-run", "--all")
                probed.run("unlock", "--prove", "--json")
                if svsm:
                    probed.run("unlock", "--prove", code=1)
                    probed.run("cap", "--json")
                probed.run("doctor", code=None)
                config.write_text('vm_id = "', encoding="utf-8")
                probed.run("unlock", code=4)


def _enrol(commands: Commands, directory: Path, root: AmdRoot, chip_id: bytes) -> VolumeAt:
    for name, content in (("ark", root.ark_der), ("ask", root.ask_der), ("crl", root.crl())):
        (directory / f"{name}.der").write_bytes(content)
    ders = [str(directory / f"{name}.der") for name in ("ark", "ask", "crl")]
    commands.verifier("endorsements", "root", "add", "--certificate", ders[0], "--label", "simulated")
    commands.verifier("endorsements", "import", *ders)
    image, passphrase = directory / "disk.img", secrets.token_hex(16)
    uuid = disk.make_volume(image, passphrase.encode())
    for vm, way, kind, digest in (
        ("svsm", "grub", "svsm-vtpm", _SVSM),
        ("direct", "direct", "snp-direct", _DIRECT),
    ):
        features = ("--svsm-feature", "vtpm") if kind == "svsm-vtpm" else ()
        commands.verifier("profile", "add", vm, "--boot-way", way, "--tcb-floor", _FLOOR)
        commands.verifier(
            *("reference", "measurement", "add", digest.hex(), "--profile", vm),
            *("--kind", kind, "--label", vm, *features),
        )
        commands.verifier("vm", "add", vm, "--profile", vm, "--chip", chip_id.hex())
        commands.verifier(
            *("volume", "add", "--vm", vm, "--device", str(image), "--name", "root", "--passphrase-fd", "0"),
            stdin=passphrase,
        )
    return VolumeAt(uuid, "root", image)


@dataclass
class _Probed:
    """The agent below the probe, with one agent.toml."""

    config: Path
    loaded: Loaded

    def run(self, verb: str, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        """Run a verb that must end with ``code`` (None: with any); gives what ``--json`` printed."""
        path = self.config.with_name("loaded.json")
        command = [
            sys.executable,
            "-P",
            str(PROBE),
            str(path),
            verb,
            "--config",
            str(self.config),
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if code is not None and done.returncode != code:
            raise KagimoriError(
                f"The exercise {verb} {' '.join(arguments)} failed.",
                code="footprint.exercise",
                expected=f"exit code {code}",
                found=f"{done.returncode}: {done.stderr.strip()}",
            )
        told = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        self.loaded.modules |= set(told["modules"])
        self.loaded.opened |= {Path(one) for one in told["opened"]}
        self.loaded.mapped |= {Path(one) for one in told["mapped"]}
        with contextlib.suppress(ValueError):
            printed: dict[str, Any] = json.loads(done.stdout)
            return printed
        return {}


def _other_key() -> str:
    """Give a public key that nobody in this exercise signs with (RFC 8032, test 1)."""
    return "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="


def main() -> int:
    """Record, and write the agent's footprint.json."""
    path = footprint_record.PATH
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    content = as_record(record(), before)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(content['packages'])} modules beside Python's own")  # noqa: T201 - a program
    return 0


if __name__ == "__main__":
    sys.exit(main())
