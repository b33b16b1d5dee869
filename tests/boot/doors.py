"""How a machine's simulated hardware behaves: a small disk that the guest's scripts and ``guest/serve.py`` read.

What a test changes here is no part of what boots, so nothing of it is measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.boot.estate import Estate, Site


@dataclass(frozen=True)
class World:
    """Which ``door`` the kernel has (fuse, cuse, module), and what is behind it.

    ``settings``: ``measurement`` in hex; ``svsm``, whether there is one; ``faults``, names of faults of the driver;
    ``errno`` of every report; ``daemon``, whether the one behind the module is absent, dies, or hangs. ``module`` is the
    file kagimori_tsm.ko, and ``arguments`` are its parameters.
    """

    door: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    module: Path | None = None
    arguments: str = ""

    def disk(self, directory: Path) -> Path:
        """Write it into an image in this directory; gives its path."""
        tree = directory / "world"
        tree.mkdir()
        (tree / "door").write_text(f"{self.door} {self.arguments}\n", encoding="ascii")
        # JSON's strings, numbers, lists of them, and truth values are TOML's, too.
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in self.settings.items()]
        (tree / "world.toml").write_text("".join(lines), encoding="utf-8")
        if self.module is not None:
            shutil.copy(self.module, tree)
        image = directory / "world.img"
        ext4 = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(image), "4M"]
        subprocess.run(ext4, check=True, stdin=subprocess.DEVNULL, timeout=60)
        return image


def site_with(estate: Estate, directory: Path, world: World) -> Site:
    """Give a site with the estate's verifier, whose machine has this hardware."""
    shutil.copytree(estate.verifier, directory / "verifier")
    return Site(estate, directory, world.disk(directory))
