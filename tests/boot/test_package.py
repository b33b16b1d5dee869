"""The agent's package: the same bytes each time, a machine that boots by it, and nothing left of it after a purge."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from package.__main__ import build
from tests.boot import images
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, Estate, Site, session_in
from tests.boot.images import SECRET, Images
from tests.boot.variants import GUEST, INITRAMFS_TOOLS, ROOT, install

pytestmark = [pytest.mark.boot, pytest.mark.slow]

OF_DPKG = ("var/lib/dpkg", "var/log", "var/cache", "var/lib/systemd", "boot")
"""Where what dpkg and its triggers do themselves leaves traces."""


def _debian(estate: Estate, to: Path) -> Path:
    """Give a Debian as its mirror has it, without the agent, in ``to``."""
    cache = Cache(ROOT / ".dev" / "boot")
    base, _ = images.build_base(cache, INITRAMFS_TOOLS)
    to.parent.mkdir(exist_ok=True)
    images.copy_tree(base / "root", to)
    return to


def _run(chroot: Path, *command: str) -> str:
    with (chroot.parent / "run.log").open("w+b") as log:
        images.in_chroot(chroot, command, log.fileno())
        log.seek(0)
        return log.read().decode(errors="replace")


def _files(chroot: Path) -> set[str]:
    """Name all files but those of dpkg's own."""
    found = set()
    for directory, below, names in os.walk(chroot):
        where = str(Path(directory).relative_to(chroot))
        below[:] = [
            one
            for one in below
            if f"{where}/{one}".removeprefix("./") not in {*OF_DPKG, "proc", "sys", "dev"}
        ]
        found |= {f"{where}/{name}" for name in [*names, *below]}
    return found


def test_two_builds_give_the_same_bytes(deb: Path, tmp_path: Path) -> None:
    """Whoever builds this commit can hold their package against another's."""
    assert build("bookworm", tmp_path).read_bytes() == deb.read_bytes()


def test_a_purge_leaves_nothing(deb: Path, estate: Estate, tmp_path: Path) -> None:
    """Neither settings nor what Python compiled; the agent runs before, and the manual page is there."""
    chroot = _debian(estate, tmp_path / "root")
    shutil.copy(deb, chroot / "root")
    before = _files(chroot)
    _run(chroot, "dpkg", "--install", f"/root/{deb.name}")
    assert "kagimori-agent" in _run(chroot, "kagimori-agent", "--version")
    assert list((chroot / "usr/lib/kagimori/python/kagimori_agent/__pycache__").glob("*.pyc"))
    (chroot / "etc/kagimori").mkdir()
    (chroot / "etc/kagimori/agent.toml").write_text("# the owner's")
    _run(chroot, "dpkg", "--purge", "kagimori-agent")
    assert _files(chroot) - before == set()


@pytest.fixture
def packaged(deb: Path, estate: Estate, tmp_path: Path) -> Site:
    """Give a site whose initramfs is made by what the package has put there."""
    chroot = _debian(estate, tmp_path / "debian/root")
    shutil.copy(deb, chroot / "root")
    _run(chroot, "dpkg", "--install", f"/root/{deb.name}")
    # The simulated hardware, and the machine's own tables.
    install(GUEST / "hook", chroot / "etc/initramfs-tools/hooks/simulated-snp")
    install(GUEST / "device", chroot / "etc/initramfs-tools/scripts/init-top/simulated-snp")
    for name in ("crypttab", "fstab"):
        shutil.copy(estate.images.chroot / "etc" / name, chroot / "etc" / name)
    built: Images = dataclasses.replace(estate.images, chroot=chroot)
    initramfs = images.make_initramfs(built, estate.agent_toml, tmp_path / "made")
    shutil.copytree(estate.verifier, tmp_path / "verifier")
    return Site(dataclasses.replace(estate, initramfs=initramfs), tmp_path)


def test_a_machine_with_the_package_is_refused_accepted_and_boots(packaged: Site) -> None:
    """By the package alone: its hooks, its modules without FAPI, its scripts."""
    with packaged.serving() as served:
        with packaged.booted(served.url) as machine:
            machine.wait_off(BOOT_S)
        packaged.verifier("reference", "accept", session_in(machine.said("")), "--yes", "--label", "package")
        shutil.rmtree(machine.directory)
        with packaged.booted(served.url) as machine:
            machine.wait_for("guest: done", BOOT_S)
            machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert packaged.events()[:2] == ["confirmed-opened", "released"]
