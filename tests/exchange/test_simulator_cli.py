"""The simulated machine by hand: which kind it boots, and which agent it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from tests.worlds import CHIP_ID

from kagimori_simulator import cli

if TYPE_CHECKING:
    from pathlib import Path

    from kagimori_simulator.amd import AmdRoot

AGENT_TOML = """\
vm_id = "web1"
kind = "{kind}"
[[verifiers]]
name = "home"
urls = ["http://127.0.0.1:9"]
keys = ["AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="]
"""
PROGRAM = """\
#!/bin/sh
verb=$1 config=$3
root=$(sed -n 's/^root = "\\(.*\\)"$/\\1/p' "$config")
grep -q '^tcti = ' "$config" && tpm=yes || tpm=no
mkdir "$root/report/mine"
echo "$verb $2 $4 tpm=$tpm level=$(cat "$root/report/mine/privlevel_floor")" >"$0.told"
rmdir "$root/report/mine"
exit 7
"""

ASK_DEVICE = """\
#!{python}
import sys, tomllib
from pathlib import Path
from kagimori_agent.devices.sev_guest import SevGuest
from kagimori_protocol.errors import KagimoriError

told = "report"
try:
    config = tomllib.loads(Path(sys.argv[3]).read_text())
    SevGuest(Path(config["sev_guest"]["device"]), vmpl=0).plain_report(bytes(64))
except KagimoriError as error:
    told = error.code
Path(sys.argv[0] + ".told").write_text(told)
"""


@pytest.fixture
def machine(tmp_path: Path, amd: AmdRoot) -> Path:
    """Give the directory that `init` would make, with the root of this run: keys take seconds."""
    directory = tmp_path / "sim"
    directory.mkdir()
    amd.save(directory / "root")
    (directory / "chip-id").write_text(CHIP_ID.hex())
    return directory


def run(machine: Path, kind: str, *words: str) -> int:
    """Run one verb in the VM of an agent.toml of this kind."""
    config = machine / "agent.toml"
    config.write_text(AGENT_TOML.format(kind=kind))
    return cli.main(["run", "--dir", str(machine), "--config", str(config), *words])


@pytest.mark.parametrize(
    ("kind", "told"), [("snp-direct", "tpm=no level=0"), ("svsm-vtpm", "tpm=yes level=2")]
)
def test_another_agent_finds_the_hardware_of_the_kind_that_agent_toml_names(
    machine: Path, kind: str, told: str
) -> None:
    """It gets verb, options and the agent.toml that names report door and TPM; its exit code is ours."""
    program = machine / "agent"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    assert run(machine, kind, "--program", str(program), "unlock", "--mine") == 7
    assert (machine / "agent.told").read_text() == f"unlock --config --mine {told}\n"


def test_an_agent_runs_where_its_caller_is(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE moves this process to the root directory; neither --program nor the agent's own --save may follow it."""
    monkeypatch.chdir(machine)
    program = machine / "agent"
    program.write_text("#!/bin/sh\npwd >told\n")
    program.chmod(0o755)
    assert run(machine, "snp-direct", "--program", "./agent", "unlock") == 0
    assert (machine / "told").read_text() == f"{machine}\n"


def test_an_agent_that_cannot_be_run_is_named(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error in --program is no traceback."""
    assert run(machine, "snp-direct", "--program", str(machine / "nothing"), "unlock") == 2
    assert "The agent cannot be run." in capsys.readouterr().err


def test_a_vm_without_a_measured_boot_cannot_boot_another_kernel(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its measurement covers the kernel, and the simulated one is fixed: nothing is silently ignored."""
    assert run(machine, "snp-direct", "--kernel", "another", "unlock") == 2
    assert "no --kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "configfs-tsm is used"),
        (["--door", "sev-guest"], "sev-guest is used"),
        (["--door", "sev-guest", "--door", "configfs-tsm"], "configfs-tsm is used; there is sev-guest, too"),
    ],
)
def test_the_kernel_has_the_report_doors_that_were_asked_for(
    machine: Path, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    """The agent's own doctor finds them."""
    run(machine, "snp-direct", *words, "doctor")
    assert f"report door: {told}\n" in capfd.readouterr().out


def test_a_lie_to_the_driver_is_told_once_the_vm_runs(machine: Path) -> None:
    """It bends what is behind both doors, so it is told by the name that its function has."""
    program = machine / "agent"
    program.write_text(ASK_DEVICE.format(python=sys.executable))
    program.chmod(0o755)
    for lies, told in (([], "report"), (["--lie", "wiped-key"], "sev-guest.key-wiped")):
        words = [*lies, "--door", "sev-guest", "--program", str(program), "unlock"]
        assert run(machine, "snp-direct", *words) == 0
        assert (machine / "agent.told").read_text() == told
