"""The operator's road on a Debian that its installer left: install the package, enrol, reboot; and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from package.__main__ import build
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, VM, Estate, Site, config_of, make_owner, session_in
from tests.boot.images import PASSPHRASE
from tests.boot.installed import ASKS, BOOKWORM, TRIXIE, Installed, install_debian, unlock_by_hand
from tests.boot.variants import ROOT, UUID, Variant

pytestmark = [pytest.mark.boot, pytest.mark.slow]

LONG_S = 4 * BOOT_S
"""Seconds for what makes an initramfs in an emulated machine."""

REENCRYPTED = "--reencrypt"
INSTALL = f"""
apt-get install -y /srv/kagimori-agent_*.deb
kagimori-agent --version
cat /dev/disk/by-id/virtio-toml >/run/agent.toml
install -D -m 644 /run/agent.toml /etc/kagimori/agent.toml
kagimori-agent doctor --host-doors || echo "owner: doctor --host-doors gave $?"
systemctl mask getty@.service serial-getty@.service
systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target suspend-then-hibernate.target
code=$(cat /dev/disk/by-id/virtio-code)
kagimori-agent enrol HOW --device /dev/disk/by-id/virtio-root --code-fd 3 --passphrase-fd 4 3<<CODE 4<<PASSPHRASE
$code
CODE
{PASSPHRASE.decode()}
PASSPHRASE
update-initramfs -u
sed 's/^/owner: toml /' /etc/kagimori/agent.toml
"""
PURGE = """
apt-get purge -y kagimori-agent
! command -v kagimori-agent
find /etc/kagimori /usr/lib/kagimori /var/lib/kagimori 2>/dev/null | sed 's/^/owner: left /'
"""


@pytest.mark.usefixtures("_can_boot")
@pytest.mark.parametrize(
    ("debian", "how"), [(BOOKWORM, ""), (TRIXIE, REENCRYPTED)], ids=["bookworm", "trixie-reencrypted"]
)
def test_a_debian_is_enrolled_released_and_purged_again(debian: Variant, how: str, tmp_path: Path) -> None:
    """By the commands of docs/enrolment.md, run in the machine; once the package is gone, it asks for the passphrase again.

    Reencrypted, the root is given another volume key below the mapping that it is in use by.
    """
    cache = Cache(ROOT / ".dev" / "boot")
    vm = install_debian(cache, debian, build(debian.suite, tmp_path / "dist"), tmp_path / "installed")
    owner = make_owner(tmp_path, vm.images)
    site = Site(Estate(vm.images, Path(), vm.root, tmp_path / "verifier", ""), tmp_path)
    toml = config_of(owner)
    code = owner("vm", "code", VM, "--json").json()["code"]

    with site.serving() as served:
        first = _run(vm, site, served.url, INSTALL.replace("HOW", how), {"toml": toml, "code": code})
    assert "owner: done, 0" in first, "\n".join(line for line in first if "systemd" not in line)[-6000:]
    assert "owner: doctor --host-doors gave 1" in first, (
        "what a login prompt and sleep are, until they are masked"
    )
    (volume,) = owner("volume", "list", "--json").json()
    assert volume["uuid"] == UUID
    assert volume["state"] == "waiting", "no reference value explains who was there when the code was typed"
    assert volume["provenance"] == ("attested-vm" if how else "unknown")
    owner("volume", "accept", "--vm", VM, UUID)

    with site.serving() as served:
        with vm.booted(site, served.url, "true\n", {}) as running:
            running.wait_off(BOOT_S)
        owner("reference", "accept", session_in(running.said("")), "--yes", "--label", "the package")
        with vm.booted(site, served.url, PURGE, {}) as running:
            running.wait_off(LONG_S)
    assert not running.said(ASKS)
    assert running.said("owner: the root is 1 mapped file system")
    assert running.said("owner: done, 0")
    assert not running.said("owner: left ")
    assert site.events()[:2] == ["confirmed-opened", "released"]

    with vm.booted(site, None, "true\n", {}) as running:
        unlock_by_hand(running, BOOT_S)
        running.wait_off(BOOT_S)
    assert running.said("owner: done, 0")
    assert not running.said("kagimori")


def _run(vm: Installed, site: Site, url: str, script: str, files: dict[str, str]) -> list[str]:
    """Boot by the passphrase, run a script there; gives what the console said."""
    with vm.booted(site, url, script, files) as running:
        unlock_by_hand(running, BOOT_S)
        running.wait_for("owner: done", LONG_S)
        running.wait_off(BOOT_S)
    return running.said("")
