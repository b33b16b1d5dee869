"""A network without IPv4: the kernel takes address and route from the router, or agent.toml has one address of its own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot import estate as estates
from tests.boot import images
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, Estate, Site, session_in
from tests.boot.images import SECRET
from tests.boot.machine import IPV6_ONLY, VERIFIER_AT
from tests.boot.scene import Scene, played
from tests.boot.variants import DRACUT, INITRAMFS_TOOLS, ROOT, Variant

pytestmark = [pytest.mark.boot, pytest.mark.slow]

PORT = 8117
STATIC = """
[network]
method = "static"
interface = "enp0s2"
address = "fd00::77/128"
gateway = "fe80::2"
"""
"""The router's address on the link, and an only address beside it, as clouds give them."""


def _estate(variant: Variant, network: str) -> Estate:
    """Give an owner's images whose agent.toml names the verifier by its IPv6 address."""
    cache = Cache(ROOT / ".dev" / "boot")
    usual = estates.build(cache, variant)
    toml = usual.agent_toml.replace(VERIFIER_AT, f"[fd00::2]:{PORT}") + network
    assert "[fd00::2]" in toml
    return replace(usual, initramfs=images.build_initramfs(cache, usual.images, toml), agent_toml=toml)


@pytest.mark.usefixtures("_can_boot")
@pytest.mark.parametrize(
    ("variant", "network", "address"),
    [
        pytest.param(INITRAMFS_TOOLS, "", r"fd00::[0-9a-f:]+/64", id="announced-initramfs-tools"),
        pytest.param(DRACUT, STATIC, r"fd00::77/128", id="static-dracut"),
    ],
)
def test_a_vm_is_released_over_ipv6_alone(
    variant: Variant, network: str, address: str, tmp_path: Path
) -> None:
    """DHCP for IPv4 never answers there, and holds nothing up."""
    site = Site(_estate(variant, network), tmp_path)
    shutil.copytree(site.estate.verifier, tmp_path / "verifier")
    settings = tmp_path / "verifier/verifier.toml"
    text = settings.read_text(encoding="utf-8")
    assert "127.0.0.1:0" in text
    settings.write_text(text.replace("127.0.0.1:0", f"[::1]:{PORT}"), encoding="utf-8")
    with site.serving():
        with played(site, None, Scene(network=IPV6_ONLY)) as machine:
            machine.wait_off(BOOT_S)
        assert machine.said("refuses the key"), machine.tail()
        site.verifier("reference", "accept", session_in(machine.said("")), "--yes", "--label", "first boot")
        shutil.rmtree(tmp_path / "vm")
        with played(site, None, Scene(network=IPV6_ONLY)) as machine:
            machine.wait_off(BOOT_S)
    assert machine.said(f"network: enp0s2 has carrier and {address}")
    assert not machine.said(r"network: enp0s2 has carrier and .*\d+\.\d+\.\d+\.\d+/")
    assert machine.said(f"guest: root reached: {SECRET}")
    assert site.events().count("released") == 1
