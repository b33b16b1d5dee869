"""What a package is of: one of the project's programs, with what it imports, in a place of its own."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from package import manual


@dataclass(frozen=True)
class Program:
    """A program: its name, its directory below ``/usr/lib``, the lock that names what it imports, its rooms of the project."""

    name: str
    place: str
    lock: str
    rooms: tuple[str, ...]

    @property
    def python(self) -> str:
        """Where its Python modules lie, relative to the root."""
        return f"usr/lib/{self.place}/python"

    @property
    def licences(self) -> str:
        """Where the licences of what it imports lie, relative to the root."""
        return f"usr/share/doc/{self.name}/licenses"


def place_commands(
    program: Program, module: str, parser: argparse.ArgumentParser, files: Path, before: str = ""
) -> None:
    """Write the program that a person starts, its manual page and its completions.

    ``module`` has its ``main``; the lines of ``before`` run before that is imported.
    """
    started = files / "usr/bin" / program.name
    lines = ("import sys", f'sys.path[:0] = ["/{program.python}"]', *before.splitlines())
    code = "\n".join(("#!/usr/bin/python3 -I", *lines, f"from {module} import main", "sys.exit(main())", ""))
    write(started, code)
    started.chmod(0o755)
    write(files / f"usr/share/man/man8/{program.name}.8", manual.page(parser, 8, "kagimori"))
    write(files / f"usr/share/bash-completion/completions/{program.name}", manual.bash(parser))
    write(files / f"usr/share/zsh/vendor-completions/_{program.name}", manual.zsh(parser))


def copy(source: Path, target: Path, mode: int | None) -> None:
    """Copy a file or all files of a directory; None keeps each file's own mode."""
    if source.is_dir():
        for one in sorted(source.iterdir()):
            copy(one, target / one.name, mode)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o755 if mode is None else mode)


def write(target: Path, text: str) -> None:
    """Write a file, and the directories that it lies in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
