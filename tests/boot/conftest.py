"""The fixtures of the boot tests. They need root, the programs of ``machine``, and this machine's own Debian mirror."""

from __future__ import annotations

import faulthandler
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from package.__main__ import build
from tests.boot import estate as estates
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, Estate, Site, session_in
from tests.boot.machine import CODE, PHASES, PROGRAMS, SECURE_BOOT, SWITCHED_ON, VARS
from tests.boot.variants import INITRAMFS_TOOLS, ROOT, Variant

PHASES_OF = "boot phases"
IN_CI = os.environ.get("CI") == "true"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave boots out unless ``-m`` names them: they take minutes, and what installs their programs is not ready."""
    if "boot" in str(config.getoption("markexpr")):
        return
    boots = [item for item in items if item.get_closest_marker("boot")]
    config.hook.pytest_deselected(items=boots)
    items[:] = [item for item in items if item not in boots]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Bear with emulated machines, and with building them: each wait has a limit of its own, and shows the console's end."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _timed(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Keep when each phase of a boot that reached its root began."""
    SWITCHED_ON.clear()
    yield
    for machine in SWITCHED_ON:
        phases = machine.phases()
        if "root" in phases:
            record_property(PHASES_OF, phases)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell the boot times as docs/performance.md has them."""
    names = [name for name, _ in PHASES]
    rows = [
        f"| {report.nodeid.partition('::')[2]} | {' | '.join(str(phases.get(name, '')) for name in names)} |"
        for report in terminalreporter.getreports("")
        if report.when == "teardown"
        for key, phases in report.user_properties
        if key == PHASES_OF
    ]
    if rows:
        terminalreporter.section("seconds from power on to each phase, of boots that reached their root")
        terminalreporter.line(f"| boot | {' | '.join(names)} |")
        terminalreporter.line("|---" * (len(names) + 1) + "|")
        for row in sorted(rows):
            terminalreporter.line(row)


@pytest.fixture(scope="session")
def _can_boot() -> None:
    missing = [
        name
        for name in (*PROGRAMS, "swtpm_setup", "mmdebstrap", "mke2fs", "mformat", "unshare")
        if shutil.which(name) is None
    ]
    firmware = [CODE, VARS, SECURE_BOOT.code, SECURE_BOOT.variables]
    missing += [str(path) for path in firmware if not path.exists()]
    if os.geteuid() != 0:
        missing.append("root's rights")
    if missing:
        explanation = f"machines cannot be booted here without {', '.join(missing)}"
        if IN_CI:
            pytest.fail(explanation)
        pytest.skip(explanation)


@pytest.fixture(scope="session")
def deb(_can_boot: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package for Debian 12."""
    return build("bookworm", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> Variant:
    """Give the Debian that is booted; a module names another by an indirect parameter."""
    named: Variant = getattr(request, "param", INITRAMFS_TOOLS)
    return named


@pytest.fixture(scope="session")
def estate(_can_boot: None, variant: Variant) -> Estate:
    """Give the images, built or out of the cache."""
    return estates.build(Cache(ROOT / ".dev" / "boot"), variant)


@pytest.fixture(scope="session")
def first_boot(estate: Estate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, list[str]]:
    """Boot once, before the owner has accepted any boot; gives the site as it is then, and what the console said."""
    directory = tmp_path_factory.mktemp("first")
    shutil.copytree(estate.verifier, directory / "verifier")
    site = Site(estate, directory)
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_off(BOOT_S)
    return site, machine.said("")


@pytest.fixture(scope="session")
def accepted(first_boot: tuple[Site, list[str]]) -> Site:
    """Give the site once its owner has looked at the first boot and accepted it."""
    site, lines = first_boot
    site.verifier("reference", "accept", session_in(lines), "--yes", "--label", "first boot")
    return site


@pytest.fixture
def site(accepted: Site, tmp_path: Path) -> Site:
    """Give a site of its own to each test, whose owner knows the honest boot."""
    shutil.copytree(accepted.directory / "verifier", tmp_path / "verifier")
    return Site(accepted.estate, tmp_path)
