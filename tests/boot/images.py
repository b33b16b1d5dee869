"""Build what a test's machine boots: a real Debian's kernel and initramfs, an encrypted root, and simulated hardware.

Four layers, each cached by the content of what it is made from: Debian as its mirror has it now; the agent in it, as a
package would install it; the encrypted root; the disk that simulates SNP. The first two are each variant's own, as is the
initramfs, which comes last, from what the distribution makes one with.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.boot import wheels as wheelhouse
from tests.boot.archive import Archive, archive
from tests.boot.cache import Cache
from tests.boot.variants import GUEST, INITRAMFS_TOOLS, ROOT, UUID, Variant, install

from kagimori_simulator.amd import AmdRoot

PASSPHRASE: Final = b"the installer's passphrase"
SECRET: Final = "what only the encrypted root holds"
MEASUREMENT: Final = "c0" * 48
_OS_RELEASE: Final = "ID=kagimori-test\n"
"""systemd goes over to no root without it."""

_PYTHON: Final = "usr/lib/kagimori/python"
_LAUNCHER: Final = f"""\
#!/usr/bin/python3 -I
import sys
sys.path[:0] = ["/{_PYTHON}"]
from kagimori_agent.cli import main
sys.exit(main())
"""
_IN_DISK: Final = (
    "usr/bin",
    "usr/sbin",
    "usr/lib/python3",
    "usr/lib/python3.11",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "etc",
)
_PYTHONS: Final = {"bookworm": "3.11", "trixie": "3.13"}
_CRYPTTAB: Final = f"cryptroot UUID={UUID} none luks,initramfs,discard\n"
PRIVATE_MOUNTS: Final = ("unshare", "--mount", "--propagation", "private", "--")
"""Before a program that mounts this machine's /proc, /sys and /dev into a directory: they go with it, however it ends."""
_TIMEOUT_S: Final = 900


@dataclass(frozen=True)
class Images:
    """What is built: ``chroot`` is Debian with the agent, ``hardware`` the simulating disk, ``volume`` the encrypted root."""

    variant: Variant
    chroot: Path
    kernel: Path
    hardware: Path
    volume: Path
    amd_root: Path
    chip_id: str


def build(cache: Cache, variant: Variant) -> Images:
    """Build everything that does not depend on a verifier. Hardware and root are the same for all variants."""
    first, base = build_base(cache, INITRAMFS_TOOLS)
    _, own = (first, base) if variant is INITRAMFS_TOOLS else build_base(cache, variant)
    amd = cache.get("amd", ["1"], _build_amd)
    hardware = cache.get(
        "hardware", [base.name, amd.name, "2"], lambda to: _build_hardware(to, base / "root", amd)
    )
    volume = cache.get(
        "volume",
        [first.name, GUEST / "init", UUID, PASSPHRASE, SECRET, _OS_RELEASE],
        lambda to: _build_volume(to, first / "root"),
    )
    return Images(
        variant,
        own / "root",
        _kernel(own / "root"),
        hardware / "disk.img",
        volume / "disk.img",
        amd / "root",
        (amd / "chip-id").read_text(),
    )


def build_debian(cache: Cache, variant: Variant) -> Path:
    """Build a variant's Debian, as its mirror has it; gives the directory in which it is ``root``."""
    source = archive(variant.suite, cache.root)
    return cache.get(
        f"{variant.name}.debian",
        [variant.suite, *variant.packages, *source.state()],
        lambda to: _build_debian(to, variant, source),
    )


def build_base(cache: Cache, variant: Variant) -> tuple[Path, Path]:
    """Build a variant's Debian, and the same with the agent; gives the directories of both, in which they are ``root``."""
    debian = build_debian(cache, variant)
    wheels = _wheels(cache, _PYTHONS[variant.suite])
    rooms = [ROOT / name for name in ("agent", "protocol", "simulator", "pyproject.toml")]
    agent = cache.get(
        f"{variant.name}.agent",
        [debian.name, wheels.name, *rooms, *variant.rooms, UUID, _CRYPTTAB],
        lambda to: _build_agent(to, debian, wheels, variant),
    )
    return debian, agent


def build_initramfs(cache: Cache, images: Images, agent_toml: str) -> Path:
    """Make an initramfs for this agent.toml with what the distribution makes one with; gives its path."""
    made_from = [images.chroot.parent.name, *images.variant.make, agent_toml]
    made = cache.get(
        f"{images.variant.name}.initramfs", made_from, lambda to: make_initramfs(images, agent_toml, to)
    )
    return made / "initrd.img"


def make_initramfs(images: Images, agent_toml: str, to: Path) -> Path:
    """Make it in the directory ``to``, with the log of what makes it; gives its path."""
    to.mkdir(exist_ok=True)
    chroot = to / "root"
    copy_tree(images.chroot, chroot)
    (chroot / "etc/kagimori").mkdir()
    (chroot / "etc/kagimori/agent.toml").write_text(agent_toml, encoding="utf-8")
    release = images.kernel.name.removeprefix("vmlinuz-")
    command = [release if word == "KERNEL" else word for word in images.variant.make]
    with (to / "make.log").open("w+b") as log:
        in_chroot(chroot, command, log.fileno())
    shutil.move(chroot / "made.img", to / "initrd.img")
    shutil.rmtree(chroot)
    return to / "initrd.img"


def _wheels(cache: Cache, python: str) -> Path:
    """Give the directory of the agent's locked packages for a Python."""
    locked = [wheelhouse.LOCKED, ROOT / "requirements/dev.txt", sys.version]
    here = cache.get("wheels", locked, wheelhouse.build)
    if python == wheelhouse.HERE:
        return here
    return cache.get(
        f"python{python}.wheels",
        [here.name, Path(wheelhouse.__file__)],
        lambda to: wheelhouse.build_for(python, to, here),
    )


def _build_debian(to: Path, variant: Variant, source: Archive) -> None:
    """Install Debian from the mirrors of this machine's own apt configuration."""
    quiet = ["man", "locale", "doc"]
    run(
        [
            *PRIVATE_MOUNTS,
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"),
            '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in quiet),
            *_apt_options(),
            f"--include={','.join(variant.packages)}",
            *(variant.suite, str(to / "root"), *map(str, source.sources)),
        ]
    )


def _apt_options() -> list[str]:
    """Repeat what this machine's apt is told about dates: its mirror may be a snapshot."""
    dumped = run(["apt-config", "dump"])
    return [
        f"--aptopt={line.rstrip(';')}" for line in dumped.splitlines() if line.startswith("Acquire::Check-")
    ]


def _build_agent(to: Path, debian: Path, wheels: Path, variant: Variant) -> None:
    """Put the agent and what runs it where a package would put them."""
    chroot = to / "root"
    copy_tree(debian / "root", chroot)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(to / "own"), str(ROOT)])
    into = ["--target", str(chroot / _PYTHON), *map(str, wheels.iterdir()), *map(str, (to / "own").iterdir())]
    options = ["--no-deps", "--no-index", "--no-compile", "--root-user-action=ignore"]
    run([*pip, "install", *options, *wheelhouse.target(_PYTHONS[variant.suite]), *into])
    mfusepy = find_spec("mfusepy")
    assert mfusepy is not None
    assert mfusepy.origin is not None
    install(Path(mfusepy.origin), chroot / "simulated/packages/mfusepy.py")
    write(chroot / "usr/bin/kagimori-agent", _LAUNCHER, 0o755)
    variant.place(chroot)
    install(GUEST / "serve.py", chroot / "simulated/serve.py")
    write(chroot / "etc/crypttab", _CRYPTTAB, 0o644)
    write(chroot / "etc/fstab", "/dev/mapper/cryptroot / ext4 ro 0 1\n", 0o644)


def _build_amd(to: Path) -> None:
    AmdRoot.create("Milan").save(to / "root")
    (to / "chip-id").write_text(secrets.token_hex(64), encoding="ascii")


def _build_hardware(to: Path, chroot: Path, amd: Path) -> None:
    """Make the disk with the simulator: a Debian without kernel and documents, and the root's keys."""
    tree = to / "tree"
    for name in _IN_DISK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        copy_tree(chroot / name, tree / name)
    (tree / "usr/lib/kagimori").mkdir()
    copy_tree(chroot / _PYTHON, tree / _PYTHON)
    copy_tree(chroot / "simulated", tree / "simulated")
    copy_tree(amd / "root", tree / "simulated/root")
    shutil.copy(amd / "chip-id", tree / "simulated/chip-id")
    (tree / "simulated/measurement").write_text(MEASUREMENT, encoding="ascii")
    for name in ("bin", "lib", "lib64", "sbin"):
        (tree / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "run", "sys", "tmp"):
        (tree / name).mkdir()
    _put_swtpm(tree / "simulated/swtpm")
    make_ext4(tree, to / "disk.img", "320M")
    shutil.rmtree(tree)


def _put_swtpm(directory: Path) -> None:
    """Put this machine's swtpm there, with all that it is linked to: a guest's second TPM, behind vtpm-proxy."""
    program = shutil.which("swtpm")
    assert program is not None
    directory.mkdir()
    words = run(["ldd", program]).split()
    for source in {program, *(word for word in words if word.startswith("/"))}:
        shutil.copy(source, directory)


def _build_volume(to: Path, debian: Path) -> None:
    """Make the encrypted root: a file system with one program in it."""
    tree = to / "tree"
    small_system(tree, debian, GUEST / "init")
    (tree / "secret").write_text(SECRET, encoding="utf-8")
    encrypted(tree, to, "48M")
    shutil.rmtree(tree)


def small_system(tree: Path, debian: Path, init: Path) -> None:
    """Put a system of one program into a directory, with the shell that runs it."""
    for name in ("bin", "dev", "proc", "sys", "run", "sbin", "etc"):
        (tree / name).mkdir(parents=True)
    busybox = debian / "usr/bin/busybox"
    shutil.copy2(busybox, tree / "bin/busybox")
    for line in run(["ldd", str(busybox)]).splitlines():
        library = next((Path(word) for word in line.split() if word.startswith("/")), None)
        if library is not None:
            target = tree / library.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(debian / library.relative_to("/"), target)
    for applet in ("cat", "poweroff", "sed", "sh"):
        (tree / "bin" / applet).symlink_to("busybox")
    install(init, tree / "sbin/init")
    (tree / "etc/os-release").write_text(_OS_RELEASE, encoding="utf-8")


def encrypted(tree: Path, to: Path, size: str) -> None:
    """Make ``disk.img`` of a tree: a file system of this size, encrypted in place without device-mapper."""
    image = to / "disk.img"
    make_ext4(tree, image, size)
    encrypt(image)


def encrypt(image: Path) -> None:
    """Encrypt a file system in place, which makes its image larger by 32 MiB."""
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size + (32 << 20))
    passphrase = image.with_name("passphrase")
    passphrase.write_bytes(PASSPHRASE)
    fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    run(
        [
            *("cryptsetup", "reencrypt", "-q", "--encrypt", "--type", "luks2", "--uuid", UUID),
            *("--reduce-device-size", "32M", "--resilience", "none", *fast),
            *("--key-file", str(passphrase), str(image)),
        ]
    )


def make_ext4(tree: Path, image: Path, size: str, label: str = "") -> None:
    """Make a file system of a tree."""
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", label, "-d", str(tree), str(image), size])


def _kernel(chroot: Path) -> Path:
    (kernel,) = (chroot / "boot").glob("vmlinuz-*")
    return kernel


def write(target: Path, text: str, mode: int) -> None:
    """Write a file of an image."""
    target.write_text(text, encoding="utf-8")
    target.chmod(mode)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a tree with owners and modes."""
    run(["cp", "-a", "--reflink=auto", str(source), str(target)])


def in_chroot(chroot: Path, command: Sequence[str], log: int) -> None:
    """Run a command in a chroot with its kernel file systems, whose mounts end with it."""
    script = (
        'mount -t proc proc "$0/proc" && mount --rbind /sys "$0/sys" && mount --rbind /dev "$0/dev" &&'
        ' exec chroot "$0" "$@"'
    )
    whole = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(chroot), *command]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        whole,
        check=False,
        timeout=_TIMEOUT_S,
        env=environment,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        os.lseek(log, 0, os.SEEK_SET)
        raise AssertionError(f"{command[0]} failed:\n{_read_all(log)}")


def _read_all(descriptor: int) -> str:
    return Path(f"/proc/self/fd/{descriptor}").read_text(encoding="utf-8", errors="replace")


def run(command: Sequence[str], **environment: str) -> str:
    """Run a program that must work; gives what it prints."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command[:6])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout
