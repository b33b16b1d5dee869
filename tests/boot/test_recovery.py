"""A verifier that burned down, and one that changes its key: the VM boots all the same, from its encrypted root."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot.estate import BOOT_S, LIMITS, VM, Site, session_in
from tests.boot.images import SECRET

pytestmark = [pytest.mark.boot, pytest.mark.slow]

_ALIGNED = 4
"""Where an archive may begin behind another (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""


def with_another_agent_toml(initramfs: Path, text: str, directory: Path) -> Path:
    """Add an archive with this agent.toml to an initramfs, as docs/verifier.md says: what comes later wins."""
    root = directory / "added"
    (root / "etc/kagimori").mkdir(parents=True)
    (root / "etc/kagimori/agent.toml").write_text(text, encoding="utf-8")
    added = subprocess.run(
        ["sh", "-c", "find etc | cpio --quiet -o -H newc -R 0:0"], cwd=root, check=True, capture_output=True
    ).stdout
    whole = initramfs.read_bytes()
    made = directory / "initrd.img"
    made.write_bytes(whole + bytes(-len(whole) % _ALIGNED) + added)
    return made


def test_a_vm_boots_against_a_verifier_that_was_restored_from_a_backup(site: Site, tmp_path: Path) -> None:
    """Another directory, another port; keys, references and the volume's key came with the backup."""
    backup, kek = tmp_path / "backup", tmp_path / "kek"
    site.verifier("backup", str(backup))
    shutil.copy2(site.directory / "verifier" / "kek", kek)
    shutil.rmtree(site.directory / "verifier")  # it burned down
    again = tmp_path / "again"
    site.verifier("restore", str(backup), "--dir", str(again / "verifier"), "--kek", str(kek))
    restored = replace(site, directory=again)
    with restored.serving() as served, restored.booted(served.url) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert restored.events()[:3] == ["confirmed-opened", "released", "restored"]


def test_a_vm_boots_across_a_change_of_the_verifiers_key(site: Site, tmp_path: Path) -> None:
    """Its new agent.toml pins both keys: the boot shows that by itself, and then the old key can go."""
    (old,) = [row["key_id"] for row in site.verifier("identity", "show", "--json").json()["keys"]]
    staged = site.verifier("identity", "rotate", "--json").json()["staged"]
    text = site.verifier("vm", "config", VM).stdout.replace('driver = "tpm_svsm"', 'driver = "tpm_crb"')
    initramfs = with_another_agent_toml(site.estate.initramfs, text + LIMITS, tmp_path)
    changed = replace(site, estate=replace(site.estate, initramfs=initramfs))
    with changed.serving() as served:
        with changed.booted(served.url) as machine:
            machine.wait_off(BOOT_S)
        assert not machine.said("root reached")
        assert changed.commands.verifier("identity", "activate", may_fail=True).code != 0, (
            "nothing has opened by it"
        )
        session = session_in(machine.said(""))
        # QEMU writes the size of the initramfs into the kernel's header, so PCR 4 differs, too.
        assert [check["id"] for check in changed.explained(session) if not check["ok"]] == ["pcr.4", "pcr.9"]
        changed.verifier("reference", "accept", session, "--yes", "--label", "with both keys")
        shutil.rmtree(changed.directory / "vm")
        with changed.booted(served.url) as machine:
            machine.wait_for("guest: done", BOOT_S)
            machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert changed.events()[:2] == ["confirmed-opened", "released"]
    assert changed.verifier("ledger", "list", "--json").json()[1]["body"]["verifier_key"] == staged
    changed.verifier("identity", "activate")
    changed.verifier("identity", "retire", old)
