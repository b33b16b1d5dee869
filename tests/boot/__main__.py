"""``./dev boot``: a real Debian, really encrypted, boots unattended through Kagimori, for a person to watch."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.boot import estate as estates
from tests.boot import images, live
from tests.boot.cache import Cache, digest
from tests.boot.estate import BOOT_S, VM, Estate, Site, session_in
from tests.boot.login import PASSWORD, with_login
from tests.boot.variants import INITRAMFS_TOOLS, ROOT

EXIT_FAILED: Final = 1
EXIT_NOT_ROOT: Final = 2
EXIT_STOPPED: Final = 130

_PROCESSORS: Final = 2
"""A whole Debian starts many services at once, unlike an initramfs."""
_LOGIN: Final = r"^\S+ login: "


def main(words: list[str]) -> int:
    """Build, boot, show; gives the exit code."""
    options = _parser().parse_args(words)
    if os.geteuid() != 0:
        print("boot: only root can build a Debian here: sudo ./dev boot", file=sys.stderr)
        return EXIT_NOT_ROOT
    try:
        return _show(console=not options.no_console and sys.stdin.isatty() and sys.stdout.isatty())
    except KeyboardInterrupt:
        print("boot: stopped; what is built is kept, and the machine is off", file=sys.stderr)
        return EXIT_STOPPED
    except AssertionError as error:
        # What the driver of the boot tests says of a machine, or of a program that builds one.
        print(f"boot: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="./dev boot",
        description="Build a Debian 12 with an encrypted root, boot it in an emulated machine with real firmware and a measured"
        " boot, and let a verifier of yours release its key. The SNP hardware is simulated, and so said in every verdict.",
        epilog="The first time, nobody has accepted this boot: it is refused, and then accepted as its owner would. What is"
        " built is kept in .dev/boot (about 3 GB); remove that to begin anew. Exit codes: 0 the login prompt was reached, 1"
        " it was not, 2 usage.",
    )
    made.add_argument(
        "--no-console",
        action="store_true",
        help="switch the machine off at its prompt (without a terminal, always)",
    )
    return made


def _show(*, console: bool) -> int:
    began = time.monotonic()
    say = _Teller(began)
    cache = Cache(ROOT / ".dev" / "boot", say.step)
    built = with_login(cache, images.build(cache, INITRAMFS_TOOLS))
    estate = estates.of(cache, built)
    site = _site(cache, estate)
    if not (site.directory / "accepted").exists():
        say.step("booting a machine that its owner's verifier has not seen before; it should get no key")
        _refused(site, say)
    say.step("booting the machine")
    with tempfile.TemporaryDirectory(prefix="kagimori-") as place, site.serving() as served:
        run = Site(estate, Path(place), processors=_PROCESSORS)
        with run.booted(served.url) as machine:
            with live.watched(machine, say.line):
                machine.wait_for(_LOGIN, BOOT_S, prompt=True)
            say.step(f"a login prompt, {time.monotonic() - began:.0f} s after the start of ./dev boot")
            _tell_seen(site, say)
            if console:
                say.step(f"the console is yours: root, password {PASSWORD}; `poweroff` or Ctrl-] ends it")
                live.hand_over(machine)
    return 0


def _site(cache: Cache, estate: Estate) -> Site:
    """Give the owner's verifier for exactly this image: what it has accepted is kept for the next time."""
    parts = [
        estate.initramfs.parent.name,
        estate.volume.parent.name,
        estate.images.variant.cmdline,
        _PROCESSORS,
    ]
    directory = cache.root / f"owned-{digest(parts)[:16]}"
    if not directory.exists():
        for old in cache.root.glob("owned-*"):
            shutil.rmtree(old)
        directory.mkdir()
        shutil.copytree(estate.verifier, directory / "verifier")
    return Site(estate, directory)


def _refused(site: Site, say: _Teller) -> None:
    with tempfile.TemporaryDirectory(prefix="kagimori-") as place, site.serving() as served:
        run = Site(site.estate, Path(place), processors=_PROCESSORS)
        with run.booted(served.url) as machine, live.watched(machine, say.line):
            machine.wait_off(BOOT_S)
        session = session_in(machine.said(""))
    say.step(f"kagimori-verifier reference accept {session}    (the owner has looked, and accepts this boot)")
    site.verifier("reference", "accept", session, "--yes", "--label", "first boot")
    (site.directory / "accepted").touch()


def _tell_seen(site: Site, say: _Teller) -> None:
    """Show what the verifier knows now: the session's checks and the ledger's last lines."""
    (released, *_) = [
        line
        for line in site.verifier("ledger", "list", "--vm", VM, "--json").json()
        if line["event"] == "released"
    ]
    say.step("what the verifier saw")
    for text in (
        site.verifier("explain", released["session"]).stdout,
        site.verifier("ledger", "list", "--vm", VM, "--limit", "4").stdout,
    ):
        for line in text.splitlines():
            say.line(f"  {line}")


class _Teller:
    """Says what goes on: steps with the seconds since the start, and what happens within them."""

    def __init__(self, began: float) -> None:
        self._began = began

    def step(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)

    def line(self, text: str) -> None:
        print(f"          {text}"[: shutil.get_terminal_size().columns], flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
