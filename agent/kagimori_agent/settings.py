"""What the scripts of an initramfs must know, also when the agent is dead: lines of NAME=VALUE, which they read as data.

Written when an initramfs is built, and again at boot where the kernel command line has a word of ours.
Import budget: that of ``config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kagimori_agent.cmdline import CommandLine
    from kagimori_agent.config import Config


def boot_settings(config: Config, line: CommandLine | None = None) -> str:
    """Give the lines; what the kernel command line says of the network takes the place of agent.toml's.

    The bounds of both keep blanks, quotes and line breaks out of every value.
    """
    network = config.network
    if line is not None and line.network is not None:
        # A card that agent.toml names is meant, unless the line names another.
        network = line.network
    interface = network.interface or config.network.interface
    lines = [f"on_failure={config.boot.on_failure}", f"network={network.method}"]
    lines += [
        f"{name}={value}"
        for name, value in (
            ("interface", interface),
            ("address", network.address),
            ("gateway", network.gateway),
        )
        if value is not None
    ]
    lines += [f"dns={address}" for address in network.dns]
    lines += [f"volume={volume.name}" for volume in config.volumes]
    # Who names a volume on the kernel command line does it by its UUID.
    lines += [f"uuid={volume.uuid}" for volume in config.volumes]
    if line is not None and line.debug:
        lines.append("debug=yes")
    return "".join(f"{one}\n" for one in lines)
