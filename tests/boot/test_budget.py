"""What the package adds to an initramfs stays what was measured, and nothing enters that no boot needs. Boots nothing.

``budget.json`` holds the bytes, compressed and unpacked, that an image with the agent has more than the same one without. A
test that fails tells what it is now; if that is meant to be, write it there, and docs/performance.md anew (``./dev bench boot``).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.boot import contents, images
from tests.boot.cache import Cache
from tests.boot.estate import LIMITS
from tests.boot.variants import INITRAMFS_TOOLS, ROOT, UUID

RECORD: Final = Path(__file__).with_name("budget.json")
TOLERANCE: Final = 0.05
TABLES: Final = {
    "etc/crypttab": f"cryptroot UUID={UUID} none luks,initramfs,discard\n",
    "etc/fstab": "/dev/mapper/cryptroot / ext4 ro 0 1\n",
}
AGENT_TOML: Final = f"""\
vm_id = "web1"
[[verifiers]]
name = "home"
urls = ["http://10.0.2.100:8117"]
keys = ["AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="]
[[volumes]]
uuid = "{UUID}"
name = "cryptroot"
{LIMITS}"""

_LIB: Final = "usr/lib/x86_64-linux-gnu"
_STDLIB: Final = "usr/lib/python3.11"
_OURS: Final = "usr/lib/kagimori/python"
FORBIDDEN: Final = (
    # What it is, where in a path it shows, and a path that it must be seen in.
    (
        "FAPI, which the agent does not use, and which brings all that follows",
        r"/libtss2-fapi\.",
        f"{_LIB}/libtss2-fapi.so.1",
    ),
    ("a second HTTP", r"/libcurl|/bin/curl$", f"{_LIB}/libcurl.so.4"),
    ("LDAP", r"/lib(ldap|lber|sasl2)[-.]", f"{_LIB}/libldap-2.5.so.0"),
    ("Kerberos", r"/lib(krb5|k5crypto|gssapi_krb5)", f"{_LIB}/libkrb5.so.3"),
    ("a second TLS", r"/lib(gnutls|nettle|hogweed)\.", f"{_LIB}/libgnutls.so.30"),
    (
        "an event loop: one process, and threads",
        r"python.*/(asyncio|concurrent|multiprocessing)/",
        f"{_STDLIB}/asyncio/tasks.pyc",
    ),
    (
        "what tests",
        r"python.*/(unittest|doctest|tests?|_pytest|pytest)(/|\.)",
        f"{_STDLIB}/unittest/case.pyc",
    ),
    ("what documents", r"python.*/(pydoc|pydoc_data)(/|\.)", f"{_STDLIB}/pydoc.pyc"),
    ("what debugs", r"python.*/(pdb|bdb|cProfile|profile|trace|tracemalloc)\.", f"{_STDLIB}/pdb.pyc"),
    (
        "what installs or builds",
        r"python.*/(pip|ensurepip|setuptools|pkg_resources|distutils|packaging|venv|lib2to3|cffi|pycparser)/",
        f"{_OURS}/pycparser/c_parser.pyc",
    ),
    ("what installing leaves", r"\.(dist|egg)-info/", f"{_OURS}/requests-2.0.dist-info/METADATA"),
    ("screens", r"python.*/(tkinter|idlelib|curses|turtle\w*)[/.]", f"{_STDLIB}/curses/panel.pyc"),
    ("databases", r"python.*/(sqlite3|dbm|_sqlite3|sqlalchemy)[/.]", f"{_STDLIB}/sqlite3/dbapi2.pyc"),
    ("XML", r"python.*/(xml|pyexpat)[/.]", f"{_STDLIB}/xml/sax/handler.pyc"),
    ("guesses at encodings", r"/(charset_normalizer|chardet)/", f"{_OURS}/charset_normalizer/md.pyc"),
    (
        "encodings of other scripts",
        r"/_(codecs_\w+|multibytecodec)\.",
        f"{_STDLIB}/lib-dynload/_codecs_jp.cpython-311.so",
    ),
    ("authorities that nobody here relies on", r"/cacert\.pem$", f"{_OURS}/certifi/cacert.pem"),
    (
        "the verifier, or the tests' simulator",
        r"kagimori_(verifier|simulator)",
        f"{_OURS}/kagimori_simulator/amd.pyc",
    ),
    ("what makes an initramfs", r"kagimori_agent/footprint", f"{_OURS}/kagimori_agent/footprint.json"),
    ("Python's sources", r"\.pyi?$", f"{_OURS}/requests/api.py"),
    ("sources in C", r"python.*\.(c|h|pxd|pyx)$", f"{_OURS}/cryptography/a.h"),
)


@dataclass(frozen=True)
class Made:
    """An initramfs with the agent, and what it is larger by than the one without."""

    files: dict[str, bytes]
    growth: dict[str, int]


@pytest.fixture(scope="module")
def made(_can_boot: None, deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make the same Debian's initramfs without the package and with it."""
    directory = tmp_path_factory.mktemp("budget")
    chroot = directory / "root"
    images.copy_tree(images.build_debian(Cache(ROOT / ".dev" / "boot"), INITRAMFS_TOOLS) / "root", chroot)
    for name, text in TABLES.items():
        images.write(chroot / name, text, 0o644)
    without = _initramfs(chroot)
    shutil.copy(deb, chroot / "root")
    _run(chroot, "dpkg", "--install", f"/root/{deb.name}")
    (chroot / "etc/kagimori").mkdir(exist_ok=True)
    images.write(chroot / "etc/kagimori/agent.toml", AGENT_TOML, 0o600)
    image = _initramfs(chroot)
    shutil.rmtree(chroot)
    return Made(
        contents.files(image),
        {
            "compressed": len(image) - len(without),
            "unpacked": len(contents.unpacked(image)) - len(contents.unpacked(without)),
        },
    )


def _initramfs(chroot: Path) -> bytes:
    (kernel,) = (chroot / "boot").glob("vmlinuz-*")
    _run(chroot, "mkinitramfs", "-o", "/made.img", kernel.name.removeprefix("vmlinuz-"))
    return (chroot / "made.img").read_bytes()


def _run(chroot: Path, *command: str) -> None:
    with (chroot.parent / "run.log").open("w+b") as log:
        images.in_chroot(chroot, command, log.fileno())


def seen(reason: str, pattern: str, paths: list[str]) -> list[str]:
    """Tell which paths hold what is forbidden."""
    return [f"{path}: {reason}" for path in paths if re.search(pattern, path)]


@pytest.mark.boot
@pytest.mark.slow
def test_the_initramfs_grows_by_what_was_recorded(made: Made) -> None:
    """Not more, and not so much less that the record would hide the next growth."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for kind, size in made.growth.items():
        assert size == pytest.approx(recorded[kind], rel=TOLERANCE), f"now {json.dumps(made.growth)}"


@pytest.mark.boot
@pytest.mark.slow
def test_nothing_is_in_it_that_no_boot_needs(made: Made) -> None:
    """Each with the reason why it was left out."""
    found = [line for reason, pattern, _ in FORBIDDEN for line in seen(reason, pattern, list(made.files))]
    assert not found, "\n".join(found)
    assert any(path.endswith("kagimori_agent/unlock.pyc") for path in made.files)
    assert any(path.endswith("cryptography/hazmat/bindings/_rust.abi3.so") for path in made.files)


@pytest.mark.boot
@pytest.mark.slow
def test_busybox_is_in_it_once(made: Made) -> None:
    """Its second name, by which our scripts call it, is the same file."""
    assert sum(bool(content) for path, content in made.files.items() if path.endswith("/busybox")) <= 1
    assert "usr/lib/kagimori/bin/busybox" in made.files


@pytest.mark.parametrize(("reason", "pattern", "sample"), FORBIDDEN, ids=[reason for reason, *_ in FORBIDDEN])
def test_what_is_forbidden_would_be_seen(reason: str, pattern: str, sample: str) -> None:
    """A pattern that fits nothing forbids nothing."""
    assert seen(reason, pattern, [sample]) == [f"{sample}: {reason}"]
