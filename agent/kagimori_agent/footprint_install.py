"""Put the footprint into the directory that an initramfs is made of.

Both initramfs systems call this in place of copying by themselves, so that there is one truth about how. Python's
sources go in compiled, by ``footprint_compile``.

Import budget: ``json``, ``shutil``, ``subprocess``, that of ``footprint``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_agent import crypttab
from kagimori_agent.footprint import LAUNCHER, Footprint
from kagimori_agent.settings import boot_settings
from kagimori_protocol.errors import ImageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kagimori_agent.config import Config

CONFIG: Final = Path("/etc/kagimori/agent.toml")
SETTINGS: Final = Path("/etc/kagimori/boot.conf")

_LAUNCHER: Final = """\
#!{python} -IS
import sys
sys.path[:0] = {search!r}
from kagimori_agent.cli import main
sys.exit(main())
"""
"""-I: neither environment nor working directory add modules; -S: nor does ``site``, whose files are not there."""
_COMPILER: Final = Path(__file__).with_name("footprint_compile.py")
_COMPILE_S: Final = 600
"""Seconds for what takes three on an idle machine: whoever makes an initramfs may do much else."""
_MOST_SHEBANG: Final = 127
"""Bytes of a first line that every kernel takes (BINPRM_BUF_SIZE before Linux 5.1)."""


def install(
    footprint: Footprint,
    directory: Path,
    config: Config,
    config_path: Path,
    table: Path = crypttab.SYSTEM,
) -> None:
    """Copy everything below ``directory``, and of the crypttab ``table`` what is for the volumes of agent.toml.

    What is there already, stays: hooks share libraries. Raises as written.
    """
    if not directory.is_dir():
        raise UsageError(
            "The initramfs's directory is not there.",
            code="footprint.directory",
            expected="an existing directory",
            found=str(directory),
        )
    lines = crypttab.lines_for(table, {volume.uuid: volume.name for volume in config.volumes})
    try:
        for path in footprint.files:
            if path not in footprint.sources:
                _copy(path, directory)
        _compile(footprint.sources, directory)
        for verifier in config.verifiers:
            if verifier.ca_file is not None:
                _write(directory, verifier.ca_file, verifier.ca_file.read_bytes(), 0o644)
        _write(directory, CONFIG, config_path.read_bytes(), 0o600)
        _write(directory, SETTINGS, boot_settings(config).encode(), 0o644)
        _write(directory, crypttab.CARRIED, lines.encode(), 0o644)
        _write(directory, LAUNCHER, _launcher(footprint), 0o755)
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(
            "The agent cannot be put into the initramfs.",
            code="footprint.copy",
            expected=f"a directory {directory} that takes the files, and files that can be read",
            found=str(error),
        ) from error


def _launcher(footprint: Footprint) -> bytes:
    text = _LAUNCHER.format(python=footprint.interpreter, search=[str(path) for path in footprint.search])
    if len(text.partition("\n")[0]) > _MOST_SHEBANG:
        raise ImageError(
            "Python's path is too long to start the agent by.",
            code="footprint.launcher",
            expected=f"at most {_MOST_SHEBANG} bytes with #! and options",
            found=str(footprint.interpreter),
        )
    return text.encode()


def _copy(path: Path, directory: Path) -> None:
    target = directory / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        if not os.path.lexists(target):
            target.symlink_to(path.readlink())
    elif not target.exists():
        shutil.copy2(path, target)


def _compile(sources: Iterable[Path], directory: Path) -> None:
    """Write each source's compiled file. Raises OSError and SubprocessError, with the words of what compiles."""
    pairs = []
    for path in sorted(sources):
        target = directory / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        pairs.append((str(path), f"{target}c"))
    done = subprocess.run(
        [sys.executable, "-IS", "-X", "no_debug_ranges", str(_COMPILER)],
        input=json.dumps(pairs),
        capture_output=True,
        check=False,
        text=True,
        timeout=_COMPILE_S,
    )
    if done.returncode != 0:
        raise OSError(done.stderr.strip()[-500:] or f"compiling ended with {done.returncode}")


def _write(directory: Path, path: Path, content: bytes, mode: int) -> None:
    target = directory / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_bytes(content)
    target.chmod(mode)
