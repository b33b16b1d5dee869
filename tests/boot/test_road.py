"""The operator's road on a Debian that its installer left: install the package, enrol, reboot; and back."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from package.__main__ import build
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, VM, Estate, Site, config_of, make_owner, session_in
from tests.boot.images import PASSPHRASE
from tests.boot.installed import ASKS, BOOKWORM, TRIXIE, Installed, install_debian, unlock_by_hand
from tests.boot.variants import ROOT, UUID, Variant

from kagimori_protocol.luks2_layout import LuksHeader, copies
from kagimori_protocol.luks2_layout import build as build_header

pytestmark = [pytest.mark.boot, pytest.mark.slow]

LONG_S = 4 * BOOT_S
"""Seconds for what makes an initramfs in an emulated machine."""
CUT_S = 5
"""Seconds after which a reencryption is cut off."""
HEADER = 16 << 20

PACKAGE = """
apt-get install -y /srv/kagimori-agent_*.deb
kagimori-agent --version
cat /dev/disk/by-id/virtio-toml >/run/agent.toml
install -D -m 644 /run/agent.toml /etc/kagimori/agent.toml
kagimori-agent doctor --host-doors || echo "owner: doctor --host-doors gave $?"
systemctl mask getty@.service serial-getty@.service
systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target suspend-then-hibernate.target
"""
ENROL = f"""
enrol() {{
code=$(cat /dev/disk/by-id/virtio-code)
kagimori-agent enrol "$@" --device /dev/disk/by-id/virtio-root --code-fd 3 --passphrase-fd 4 3<<CODE 4<<PASSPHRASE
$code
CODE
{PASSPHRASE.decode()}
PASSPHRASE
}}
"""
ENROLLED = """
update-initramfs -u
sed 's/^/owner: toml /' /etc/kagimori/agent.toml
"""
INSTALL = PACKAGE + ENROL + "enrol\n" + ENROLLED
CUT_OFF = (
    PACKAGE
    + ENROL
    + """
sync
(until cryptsetup luksDump /dev/disk/by-id/virtio-root | grep -q online-reencrypt; do sleep 0.2; done
echo "owner: reencrypting") &
enrol --reencrypt
"""
)
RESUMED = (
    ENROL
    + """
enrol --reencrypt || echo "owner: the first run gave $?"
cryptsetup luksDump /dev/disk/by-id/virtio-root | sed 's/^/owner: dump /'
(until dmsetup ls | grep -q ^kagimori-header; do sleep 0.2; done
sleep 1
for time in 1 2 3 4 5 6 7 8; do
base64 -d /dev/disk/by-id/virtio-forged | dd of=/dev/disk/by-id/virtio-root conv=notrunc,fsync 2>/dev/null
sleep 0.2
done
cryptsetup luksDump /dev/disk/by-id/virtio-root | sed -n 's/.*cipher: */owner: the disk says /p'
dmsetup ls | grep -c ^kagimori-header | sed 's/^/owner: below way still: /') &
enrol --reencrypt
wait
dmsetup ls | sed 's/^/owner: mapped /'
losetup --all | sed 's/^/owner: loop /'
"""
    + ENROLLED
)
PURGE = """
apt-get purge -y kagimori-agent
! command -v kagimori-agent
find /etc/kagimori /usr/lib/kagimori /var/lib/kagimori 2>/dev/null | sed 's/^/owner: left /'
"""


@pytest.mark.usefixtures("_can_boot")
@pytest.mark.parametrize(
    ("debian", "reencrypted"), [(BOOKWORM, False), (TRIXIE, True)], ids=["bookworm", "trixie-reencrypted"]
)
def test_a_debian_is_enrolled_released_and_purged_again(
    debian: Variant, reencrypted: bool, tmp_path: Path
) -> None:
    """By the commands of docs/enrolment.md, run in the machine; once the package is gone, it asks for the passphrase again.

    Reencrypted, the root is given another volume key below the mapping that it is in use by. The first time the machine is
    switched off in the middle; the second, its host writes a header of its own over the disk's while cryptsetup is at work.
    """
    cache = Cache(ROOT / ".dev" / "boot")
    vm = install_debian(cache, debian, build(debian.suite, tmp_path / "dist"), tmp_path / "installed")
    owner = make_owner(tmp_path, vm.images)
    site = Site(Estate(vm.images, Path(), vm.root, tmp_path / "verifier", ""), tmp_path)
    toml = config_of(owner)
    code = owner("vm", "code", VM, "--json").json()["code"]

    with site.serving() as served:
        if reencrypted:
            first = _cut_off(vm, site, served.url, {"toml": toml, "code": code})
            files = {"code": code, "forged": _forged(vm)}
            second = _run(vm, site, served.url, RESUMED, files)
            assert "owner: the first run gave 3" in second, _last(second)
            assert "owner: the disk says cipher_null-ecb" in second, "the host's header is there"
            assert "owner: below way still: 1" in second
            assert "owner: done, 0" in second, _last(second)
            assert not [line for line in second if "owner: loop" in line or "owner: mapped kagimori" in line]
        else:
            first = _run(vm, site, served.url, INSTALL, {"toml": toml, "code": code})
            assert "owner: done, 0" in first, _last(first)
    assert "owner: doctor --host-doors gave 1" in first, (
        "what a login prompt and sleep are, until they are masked"
    )
    (volume,) = owner("volume", "list", "--json").json()
    assert volume["uuid"] == UUID
    assert volume["state"] == "waiting", "no reference value explains who was there when the code was typed"
    assert volume["provenance"] == ("attested-vm" if reencrypted else "unknown")
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


def _cut_off(vm: Installed, site: Site, url: str, files: dict[str, str]) -> list[str]:
    """Begin to reencrypt, and switch the machine off in the middle of it."""
    with vm.booted(site, url, CUT_OFF, files) as running:
        unlock_by_hand(running, BOOT_S)
        running.wait_for("owner: reencrypting", LONG_S)
        time.sleep(CUT_S)
        assert not running.said("owner: done"), running.tail()
    return running.said("")


def _forged(vm: Installed) -> str:
    """Give a header, in base64, as a host would want it: newest by far, with the owner's keyslots, and the data in clear."""
    with vm.root.open("rb") as disk:
        raw = disk.read(HEADER)
    newest = max(
        (
            one
            for one in copies(lambda offset, size: raw[offset : offset + size])
            if isinstance(one, LuksHeader)
        ),
        key=lambda one: one.seqid,
    )
    document = json.loads(json.dumps(newest.json))
    assert "requirements" in document["config"], "it was switched off in the middle"
    del document["config"]["requirements"]
    old = next(one for one in document["digests"].values() if "0" in one["keyslots"])
    segment = {**document["segments"]["0"], "size": "dynamic", "encryption": "cipher_null-ecb"}
    segment.pop("flags", None)
    document |= {
        "keyslots": {"0": document["keyslots"]["0"]},
        "segments": {"0": segment},
        "digests": {"0": {**old, "keyslots": ["0"], "segments": ["0"]}},
    }
    forged = replace(newest, json=document, seqid=newest.seqid + 1000, offset=0)
    return base64.b64encode(build_header(forged, (b"a host's", b"own"))).decode()


def _last(lines: list[str]) -> str:
    return "\n".join(line for line in lines if "systemd" not in line)[-6000:]
