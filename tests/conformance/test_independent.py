"""Another agent and another verifier, written from the documents alone, against ours over HTTP."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests import volumes
from tests.worlds import VM

from kagimori_agent.unlock import dry_run, unlock
from kagimori_protocol import messages
from kagimori_protocol.errors import Refused
from kagimori_simulator import disk, measured_boot
from kagimori_simulator.world import VerifierAt, VolumeAt
from kagimori_verifier import enrolling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.worlds import Enrolled

    from kagimori_simulator.world import World

HERE: Final = Path(__file__).parent
PROGRAMS: Final = ("independent_agent.py", "independent_verifier.py")
TIMEOUT_S: Final = 60
OTHER_BOOT: Final = measured_boot.grub(cmdline="root=/dev/mapper/cryptroot init=/bin/sh")


def agent(world: World, verb: str, *lines: str) -> tuple[int, Any]:
    """Run the other agent in a VM; gives its exit code and what it told."""
    program, config = str(HERE / "independent_agent.py"), str(world.directory / "agent.toml")
    command = [sys.executable, program, verb, "--config", config]
    said = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=said, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout or "null")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_other_side_shares_no_code_with_ours(program: str) -> None:
    """It proves nothing about the documents if it borrows what they describe."""
    path = HERE / program
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"cryptography", "requests", "tpm2_pytss"}
    assert os.access(path, os.X_OK)


def test_another_agent_gets_its_key_without_a_tpm_once(enrolled_direct: Enrolled) -> None:
    """Kind snp-direct: the key opens the volume, the Confirm counts, and the boot gets no second one."""
    with enrolled_direct.booted() as (world, _):
        code, told = agent(world, "unlock")
        assert (code, told["proved"], told["confirmed"]) == (0, [enrolled_direct.volume.uuid], True)
        assert enrolled_direct.owner.events(told["session"]) == ["released", "confirmed-opened"]
        code, told = agent(world, "unlock")
        assert (code, told["failing"]) == (1, ["boot.unopened"])


def test_another_agent_enrols_a_volume_by_the_owners_code(enrolled_direct: Enrolled, tmp_path: Path) -> None:
    """From protocol.md alone: the code is read, and proved; the keys that come back open the volume, the recovery key, too."""
    owner, image, recovery = enrolled_direct.owner, tmp_path / "new.img", bytes(range(32))
    owner.change_vm(VM, purposes=["unlock", "dry-run", "enrol"])

    def wrapped(code_key: bytes) -> bytes:
        return owner.verifier.unlock_keys.wrap_recovery_key(recovery, VM, code_key)

    with owner.verifier.store.write() as txn:
        code, _ = enrolling.make_code(txn, VM, owner.now_s(), wrapped_recovery=wrapped)
    enrolled_direct.volume = VolumeAt(disk.make_volume(image, b"a passphrase"), "cryptnew", image)
    with enrolled_direct.booted() as (world, _):
        status, told = agent(world, "enrol", code.text().upper(), "a passphrase")
    assert (status, told["proved"], told["confirmed"]) == (0, [enrolled_direct.volume.uuid], True)
    events = ["released", "recovery-given", "volume-enrolled", "confirmed-opened"]
    assert owner.events(told["session"]) == events
    assert volumes.opens(image, recovery)


@pytest.mark.slow
def test_another_agent_gets_its_key_with_a_vtpm_and_caps_the_boot(enrolled: Enrolled) -> None:
    """Kind svsm-vtpm: manifest, quote, credential and both layers, made and opened by other code than ours."""
    with enrolled.booted() as (world, _):
        code, told = agent(world, "dry-run")
        assert (code, told["allowed"]) == (0, True)
        code, told = agent(world, "unlock")
        assert (code, told["proved"], told["confirmed"]) == (0, [enrolled.volume.uuid], True)
        assert enrolled.owner.events(told["session"]) == ["released", "confirmed-opened"]
        code, told = agent(world, "unlock")
        assert code == 1
        assert "cap.off" in told["failing"]


def test_another_agent_is_told_why_it_gets_no_key(enrolled: Enrolled) -> None:
    """The verdict reaches it, sealed, as it reaches ours."""
    with enrolled.booted(OTHER_BOOT) as (world, _):
        code, told = agent(world, "unlock")
    assert (code, told["proved"], told["confirmed"]) == (1, [], True)
    assert "pcr.8" in told["failing"]


@contextlib.contextmanager
def served(vm: Enrolled, *options: str) -> Iterator[tuple[VerifierAt, Path]]:
    """Run the other verifier for a VM; gives where it is, and the file that it tells of Confirms in."""
    key, told = vm.directory / "unlock-key", vm.directory / "told"
    key.write_bytes(vm.unlock_key)
    command = [
        sys.executable,
        str(HERE / "independent_verifier.py"),
        "--vm",
        "web1",
        "--volume",
        vm.volume.uuid,
    ]
    command += ["--key-file", str(key), *options]
    with (
        told.open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = process.stdout.readline() if process.stdout else ""
            at = json.loads(line)
            yield VerifierAt("another", [at["url"]], [at["public_key"]]), told
        finally:
            process.terminate()


BOTH_KINDS = pytest.mark.parametrize("kind", ["enrolled", "enrolled_direct"])


@BOTH_KINDS
def test_our_agent_gets_its_key_from_another_verifier(kind: str, request: pytest.FixtureRequest) -> None:
    """Signatures, token, credential, both layers and Confirm, made by other code than ours."""
    vm: Enrolled = request.getfixturevalue(kind)
    with served(vm) as (another, told), vm.booted(verifiers=[another]) as (_, config):
        verdict, _ = dry_run(config, lambda _: None)
        assert verdict.allowed
        unlocked = unlock(config, lambda _: None, prove=True)
        assert (unlocked.volumes[0].how, unlocked.confirmed) == ("proved", True)
        assert told.read_text() == "confirmed received\nconfirmed opened\n"


def test_our_agent_is_refused_by_another_verifier_with_its_reason(enrolled_direct: Enrolled) -> None:
    """The verdict's words come through."""
    with (
        served(enrolled_direct, "--refuse") as (another, told),
        enrolled_direct.booted(verifiers=[another]) as (_, config),
    ):
        with pytest.raises(Refused) as caught:
            unlock(config, lambda _: None, prove=True)
        assert "another day" in (caught.value.expected or "")
        assert told.read_text() == "confirmed received\n"


@pytest.mark.parametrize("first", ["home", "another"])
def test_one_report_and_one_quote_answer_the_challenges_of_both_verifiers(
    enrolled: Enrolled, first: str
) -> None:
    """Both compute the same T0 over both challenges in order; the agent takes the first one's answer."""
    with served(enrolled) as (another, told):
        at = sorted([another, enrolled.verifier()], key=lambda one: one.name != first)
        with enrolled.booted(verifiers=at) as (_, config):
            said: list[str] = []
            verdict, answered = dry_run(config, said.append)
    assert verdict.allowed
    assert answered.endpoint.name == first
    assert len(messages.decode(messages.Evidence, answered.evidence).challenges) == 2
    assert (told.read_text() == "confirmed received\n") == (first == "another")


@BOTH_KINDS
def test_another_agent_and_another_verifier_understand_each_other(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """And not only ours, which might be wrong in the same way on both ends."""
    vm: Enrolled = request.getfixturevalue(kind)
    with served(vm) as (another, _), vm.booted(verifiers=[another]) as (world, _):
        code, told = agent(world, "unlock")
    assert (code, told["proved"], told["confirmed"]) == (0, [vm.volume.uuid], True)
