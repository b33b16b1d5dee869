"""What an initramfs carries is what the agent needs: names become files, and a name that does not is an error."""

from __future__ import annotations

import ast
import encodings
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kagimori_agent import (
    footprint,
    footprint_kernel,
    footprint_libraries,
    footprint_modules,
    footprint_record,
)
from kagimori_agent.cli import main
from kagimori_agent.config import load
from kagimori_agent.devices import DEVICES
from kagimori_agent.footprint import Footprint
from kagimori_agent.footprint_install import install
from kagimori_agent.footprint_needs import CODECS, PARTS, Driver
from kagimori_agent.footprint_needs import DEVICES as DECLARED
from kagimori_protocol.errors import ImageError, UsageError

ROOT = Path(__file__).parent.parent.parent
RELEASE = "6.99.0-test"
DRIVERS = [driver for part in PARTS for driver in part.drivers]

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
AGENT_TOML = f"""\
vm_id = "web1"
[[verifiers]]
name = "home"
urls = ["http://kagi.example"]
keys = ["AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="]
[[volumes]]
uuid = "{UUID}"
name = "cryptroot"
"""


def make_kernel(root: Path, modules: list[str], builtin: list[str]) -> Path:
    """Write what depmod would, for a kernel with these modules."""
    directory = root / RELEASE
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "modules.dep").write_text(
        "".join(f"kernel/drivers/{name}.ko.xz: kernel/a.ko\n" for name in modules)
    )
    (directory / "modules.builtin").write_text("".join(f"kernel/crypto/{name}.ko\n" for name in builtin))
    return root


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory of kernels with one that has every driver, spelt as files are."""
    names = [driver.names[0].replace("_", "-") for driver in DRIVERS]
    return make_kernel(tmp_path_factory.mktemp("modules"), names[::2], names[1::2])


@pytest.fixture(scope="module")
def found(kernels: Path) -> Footprint:
    """Give this machine's footprint."""
    return footprint.resolve(RELEASE, kernels)


@pytest.fixture(scope="module")
def installed(found: Footprint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory that holds all of it."""
    return put(found, tmp_path_factory.mktemp("initramfs"))


@pytest.fixture
def small(found: Footprint) -> Footprint:
    """Give two of its files, to be put somewhere quickly."""
    files = [path for path in found.files if path.name in {"exchange.py", "libcryptsetup.so.12"}]
    assert len(files) == 2
    return replace(found, files=tuple(files))


def put(footprint: Footprint, into: Path, agent_toml: str = AGENT_TOML) -> Path:
    """Install a footprint into a directory, with this agent.toml, and give the directory."""
    config = into.with_name(f"{into.name}.toml")
    config.write_text(agent_toml)
    install(footprint, into, load(config), config)
    return into


def test_every_file_that_is_named_is_there(found: Footprint) -> None:
    """Links come with what they lead to; nothing is named twice or relatively."""
    assert len(set(found.files)) == len(found.files)
    for path in found.files:
        assert path.is_absolute()
        assert path.exists()
        if path.is_symlink():
            assert (path.parent / path.readlink()).parent.resolve() / Path(
                path.readlink()
            ).name in found.files


def test_the_agent_runs_from_its_footprint_alone(found: Footprint, installed: Path) -> None:
    """Modules found anywhere else would hide that one is missing in an initramfs."""
    assert not [path for path in installed.rglob("*.py") if path.is_file()]
    stdlib = f"{installed}{Path(os.__file__).parent}"
    places = [stdlib, f"{stdlib}/lib-dynload", *(f"{installed}{path}" for path in found.search)]
    # The machine's interpreter, told to look nowhere but in there. What is frozen into it has no file to be missing.
    program = (
        f"import sys; sys.path[:] = {places!r}\n"
        "for name in [n for n in sys.modules if getattr(sys.modules[n], '__file__', None)]: del sys.modules[name]\n"
        "sys.path_importer_cache.clear()\n"
        "from kagimori_agent.cli import main\n"
        "main(['doctor', '--json', '--config', sys.argv[1]])\n"
        "import kagimori_agent.unlock, kagimori_agent.devices.vtpm, requests, encodings.idna, tpm2_pytss\n"
        "print([m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)\n"
        "    and getattr(m.__spec__, 'origin', '') != 'frozen' and not m.__file__.startswith(sys.argv[2])], file=sys.stderr)\n"
    )
    config = installed / "etc/kagimori/agent.toml"
    command = [sys.executable, "-IS", "-c", program, str(config), str(installed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["findings"]


def test_what_starts_the_agent_needs_no_environment(installed: Path) -> None:
    """The launcher names the real interpreter and the directories of packages, whatever virtual environment built it."""
    launcher = installed / "usr/bin/kagimori-agent"
    assert launcher.read_text().startswith(f"#!{Path(sys.executable).resolve()} -IS\n")
    assert os.access(launcher, os.X_OK)
    assert (installed / "etc/kagimori/agent.toml").read_text() == AGENT_TOML
    assert (installed / "etc/kagimori/agent.toml").stat().st_mode & 0o777 == 0o600
    told = (installed / "etc/kagimori/boot.conf").read_text()
    assert told == f"on_failure=poweroff\nnetwork=dhcp\nvolume=cryptroot\nuuid={UUID}\n"


def test_python_comes_compiled_and_is_not_checked_against_sources(found: Footprint, installed: Path) -> None:
    """A clock in 2009 or a file's new date must not make each boot compile again (PEP 552: flags 1, unchecked)."""
    compiled = list(installed.rglob("*.pyc"))
    assert len(compiled) == len(found.sources)
    assert {int.from_bytes(path.read_bytes()[4:8], "little") for path in compiled} == {1}


def test_a_ca_file_goes_where_agent_toml_says(small: Footprint, tmp_path: Path) -> None:
    """A verifier's TLS could not be checked at boot if its certificates stayed behind."""
    authority = tmp_path / "ca.pem"
    authority.write_text("certificates")
    (tmp_path / "into").mkdir()
    text = AGENT_TOML.replace("[[volumes]]", f'ca_file = "{authority}"\n[[volumes]]')
    into = put(small, tmp_path / "into", text)
    assert (into / authority.relative_to("/")).read_text() == "certificates"
    authority.unlink()
    with pytest.raises(ImageError) as caught:
        put(small, into, text)
    assert caught.value.code == "footprint.copy"


def test_what_another_hook_has_put_there_stays(small: Footprint, tmp_path: Path) -> None:
    """Libraries are shared between hooks; our own settings are not."""
    library = next(path for path in small.files if path.suffix != ".py").relative_to("/")
    (tmp_path / library.parent).mkdir(parents=True)
    (tmp_path / library).write_text("another hook's")
    (tmp_path / "etc/kagimori").mkdir(parents=True)
    (tmp_path / "etc/kagimori/boot.conf").write_text("an earlier one")
    put(small, tmp_path)
    assert (tmp_path / library).read_text() == "another hook's"
    assert "on_failure=poweroff" in (tmp_path / "etc/kagimori/boot.conf").read_text()


def test_a_directory_that_is_not_there_is_named(small: Footprint, tmp_path: Path) -> None:
    """A hook without DESTDIR must not fill the machine's own root."""
    with pytest.raises(UsageError) as caught:
        put(small, tmp_path / "nowhere")
    assert caught.value.code == "footprint.directory"


def test_a_module_that_is_not_installed_stops_everything() -> None:
    """An initramfs that lacks a module boots into a refusal; better it is never built."""
    with pytest.raises(ImageError) as caught:
        footprint_modules.files(["json.decoder", "requests.gone", "nowhere", "sys"])
    assert caught.value.code == "footprint.module"
    assert caught.value.found == "not requests.gone, nowhere"


def test_a_module_that_its_package_makes_itself_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13.0 has a file collections/abc.py, that of Debian 13 has none; another's absence is still an error."""
    assert footprint_modules.files(["collections.abc"])
    monkeypatch.setattr(footprint_modules, "find", lambda _: None)
    assert footprint_modules.files(["collections.abc"]) == {}
    with pytest.raises(ImageError):
        footprint_modules.files(["collections.abc", "collections"])


def test_looking_a_module_up_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that starts something when imported does not start it while an initramfs is made."""
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "loud/inner.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert footprint_modules.files(["loud.inner"]) == {"loud.inner": tmp_path / "loud/inner.py"}


def test_data_in_a_package_is_found_or_named() -> None:
    """Such as a list of certificates beside the module that opens it."""
    (found,) = footprint_modules.data(["certifi:cacert.pem"])
    assert found.is_file()
    for name in ("certifi:gone.pem", "nowhere:file"):
        with pytest.raises(ImageError) as caught:
            footprint_modules.data([name])
        assert caught.value.code == "footprint.data"


def test_a_library_that_no_linker_finds_is_named_with_who_needs_it(tmp_path: Path) -> None:
    """Ask the dynamic linker, not a package manager: only its view counts in an initramfs."""
    with pytest.raises(ImageError) as caught:
        footprint_libraries.opened({"libgone.so.9": "a test"}, Path(sys.executable).resolve())
    assert caught.value.found == "not libgone.so.9 (a test)"
    program = tmp_path / "program.c"
    program.write_text("int gone(void); int main(void) { return gone(); }")
    (tmp_path / "gone.c").write_text("int gone(void) { return 0; }")
    build = (
        ["gcc", "-shared", "-o", "libgone.so", "gone.c"],
        ["gcc", "-o", "program", "program.c", "-L.", "-lgone"],
    )
    for command in build:
        subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ImageError) as caught:
        footprint_libraries.linked([tmp_path / "program", Path("/bin/sh").resolve()])
    assert caught.value.code == "footprint.library"
    assert caught.value.found == f"not libgone.so of {tmp_path}/program"


def test_a_linker_that_does_not_end_is_named_with_the_time_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the hundred files that it was asked about."""
    monkeypatch.setattr(footprint_libraries, "_TIMEOUT_S", 0.001)
    with pytest.raises(ImageError) as caught:
        footprint_libraries.linked([Path(sys.executable).resolve()])
    assert (caught.value.code, caught.value.found) == ("footprint.linker", "no end of it within 0.001 s")


def test_links_are_followed_to_their_end_and_no_further(tmp_path: Path) -> None:
    """A chain of links is copied whole; one that bites its own tail is not followed for ever."""
    (tmp_path / "real").write_text("")
    (tmp_path / "middle").symlink_to("real")
    (tmp_path / "first").symlink_to(tmp_path / "middle")
    chain = footprint_libraries.chain([tmp_path / "first"])
    assert chain == {tmp_path / name for name in ("first", "middle", "real")}
    (tmp_path / "round").symlink_to("round")
    assert footprint_libraries.chain([tmp_path / "round"]) == {tmp_path / "round"}


def test_a_driver_is_a_module_or_built_in_or_absent_with_its_reason(tmp_path: Path) -> None:
    """What hardware alone needs may be absent; the list says so instead of leaving it out."""
    required = [driver.names[-1] for driver in DRIVERS if driver.need == "required"]
    root = make_kernel(tmp_path, required[1:], [required[0], "tpm-crb"])
    lines = list(
        Footprint(
            Path("/p"), (), (), frozenset(), tuple(footprint_kernel.resolve(DRIVERS, RELEASE, root))
        ).lines()
    )
    assert f"builtin {required[0]}" in lines
    assert "builtin tpm_crb" in lines
    assert f"module {required[1]}" in lines
    assert "absent tsm/tsm_report wanted: the report door (Linux 6.7, CONFIG_TSM_REPORTS)" in lines
    assert "absent gve hardware: network of Google's cloud" in lines


def test_a_kernel_without_what_every_unlock_needs_is_refused(tmp_path: Path) -> None:
    """All that is missing is told at once."""
    with pytest.raises(ImageError) as caught:
        footprint_kernel.resolve(DRIVERS, RELEASE, make_kernel(tmp_path, ["dm-mod"], ["xts"]))
    assert caught.value.code == "footprint.driver"
    assert "dm_crypt: the mapping of an encrypted volume" in str(caught.value.expected)
    assert "xts" not in str(caught.value.expected)
    with pytest.raises(UsageError):
        footprint_kernel.resolve([Driver(("x",), "hardware", "y")], "6.0.0-gone", tmp_path)


def test_every_door_says_what_it_needs() -> None:
    """Who adds a device declares what only its hardware loads, even if that is nothing."""
    assert set(DEVICES) <= set(DECLARED)


def test_every_codec_that_our_sources_name_is_carried() -> None:
    """Python loads a codec at its first use, so a path that was never recorded would fail with LookupError at a boot."""
    named = set(_codecs_named())
    assert {"ascii", "utf_8"} <= named
    carried = {*footprint_record.load().stdlib, *CODECS}
    assert {name for name in named if f"encodings.{name}" not in carried} == set()


def _codecs_named() -> Iterator[str]:
    for package in ("agent/kagimori_agent", "protocol/kagimori_protocol"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield from map(encodings.normalize_encoding, _codecs_of(node))


def _codecs_of(call: ast.Call) -> Iterator[str]:
    """Give what a call names as a codec: ``encoding=``, or the first argument of encode and decode."""
    values: list[ast.expr] = [one.value for one in call.keywords if one.arg == "encoding"]
    if isinstance(call.func, ast.Attribute) and call.func.attr in {"encode", "decode"}:
        values += call.args[:1]
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def test_another_python_than_the_recorded_ones_is_refused() -> None:
    """Their own modules differ from release to release; a guess would fail at a boot."""
    with pytest.raises(ImageError) as caught:
        footprint_record.load(python="3.9")
    assert caught.value.code == "footprint.python"
    assert "3.11" in str(caught.value.expected)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"stdlib": 3, "packages": [], "data": []}'])
def test_a_damaged_record_is_an_error_of_the_image(tmp_path: Path, content: str | None) -> None:
    """Never a traceback while an initramfs is made."""
    path = tmp_path / "footprint.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ImageError) as caught:
        footprint_record.load(path)
    assert caught.value.code == "footprint.record"


def test_the_verb_prints_lines_for_scripts_and_json(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both initramfs systems read the lines; each has one word first."""
    whole = footprint.resolve(RELEASE, kernels)
    monkeypatch.setattr(footprint, "resolve", lambda _release: whole)
    assert main(["footprint", "--kernel", RELEASE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"python", "file", "module", "builtin"}
    assert main(["footprint", "--kernel", RELEASE, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [line.removeprefix("file ") for line in lines if line.startswith("file ")]
    assert len(told["kernel_modules"]) == len(whole.drivers)


def test_the_verb_refuses_a_kernel_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    """The hook names a kernel; a typing error is not taken for the running one."""
    assert main(["footprint", "--kernel", "6.0.0-gone"]) == 2
    assert "no such kernel" in capsys.readouterr().err
