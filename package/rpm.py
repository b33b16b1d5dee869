"""What an .rpm of the agent holds: the files of its .deb, where Fedora and openSUSE have such, without what is Debian's alone.

Run by package/kagimori-agent.spec, with the agent importable: ``python -m package.rpm BUILDROOT``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from package import agent

DEBIANS: Final = ("usr/share/initramfs-tools", "usr/share/doc/kagimori-agent/examples")
"""Of initramfs-tools, and for its update-grub: neither distribution has one of them."""
MOVED: Final = {"usr/share/zsh/vendor-completions": "usr/share/zsh/site-functions"}


def place(files: Path) -> None:
    """Put everything but the Python modules where it belongs."""
    agent.place(files)
    for name in DEBIANS:
        shutil.rmtree(files / name)
    for name, to in MOVED.items():
        (files / name).rename(files / to)
    documents = files / "usr/share/doc/kagimori-agent"
    if not any(documents.iterdir()):
        documents.rmdir()


if __name__ == "__main__":
    place(Path(sys.argv[1]))
