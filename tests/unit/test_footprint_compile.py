"""An initramfs carries Python's modules without what only a reader at a desk needs, and runs them alike."""

from __future__ import annotations

import ast
import importlib.util
import json
import marshal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from kagimori_agent import footprint_compile, footprint_modules
from kagimori_agent.config import load
from kagimori_agent.footprint import Footprint
from kagimori_agent.footprint_install import install
from kagimori_protocol.errors import ImageError

ROOT = Path(__file__).parent.parent.parent
DOCUMENTED = """
    '''Of the module.'''
    from __future__ import annotations
    from dataclasses import dataclass

    def f(x):
        '''Of the function.'''
        assert x, "an assertion"
        return x

    def only():
        '''Of a function without more.'''

    async def g():
        '''Of the coroutine.'''

    class Plain:
        '''Of the class.'''
        text = "kept"

    @dataclass
    class Point:
        '''Of the dataclass.'''
        x: int = 1
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a module with every kind of docstring."""
    path = tmp_path / "documented.py"
    path.write_text(textwrap.dedent(DOCUMENTED))
    return path


def compile_all(pairs: list[tuple[Path, Path]]) -> subprocess.CompletedProcess[str]:
    """Compile as an initramfs's hook does."""
    program = Path(footprint_compile.__file__)
    return subprocess.run(
        [sys.executable, "-IS", "-X", "no_debug_ranges", str(program)],
        input=json.dumps([[str(path) for path in pair] for pair in pairs]),
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


def imported(path: Path) -> Any:  # noqa: ANN401 - a module made for a test
    """Import a compiled file."""
    spec = importlib.util.spec_from_file_location("documented", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["documented"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["documented"]
    return module


def codes(code: CodeType) -> Iterator[CodeType]:
    """Give a code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def test_docstrings_go_and_everything_else_stays(source: Path, tmp_path: Path) -> None:
    """Assertions first of all: -OO would take them, too, and libraries may rely on them."""
    target = tmp_path / "documented.pyc"
    assert compile_all([(source, target)]).returncode == 0
    module = imported(target)
    assert [
        module.__doc__,
        module.f.__doc__,
        module.only.__doc__,
        module.g.__doc__,
        module.Plain.__doc__,
    ] == [None] * 5
    assert b"Of the" not in target.read_bytes()
    assert (module.f(2), module.only(), module.Plain.text, module.Point().x) == (2, None, "kept", 1)
    with pytest.raises(AssertionError, match="an assertion"):
        module.f(0)


def test_a_dataclass_writes_itself_no_docstring(source: Path, tmp_path: Path) -> None:
    """It would take its own signature apart for that, at each import."""
    target = tmp_path / "documented.pyc"
    compile_all([(source, target)])
    assert imported(target).Point.__doc__ == "-"


def test_positions_have_lines_and_no_columns(source: Path, tmp_path: Path) -> None:
    """A traceback in a rescue shell still names the line."""
    target = tmp_path / "documented.pyc"
    compile_all([(source, target)])
    code = marshal.loads(target.read_bytes()[16:])  # noqa: S302 - what was just compiled
    positions = [position for one in codes(code) for position in one.co_positions()]
    lines = {line for line, *_ in positions}
    with_assertion = next(
        node.lineno for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Assert)
    )
    assert with_assertion in lines
    assert {column for *_, column, end in positions for column in (column, end)} == {None}


def test_each_of_our_modules_means_the_same_as_before(tmp_path: Path) -> None:
    """But for docstrings: names, constants and functions of a module stay in their order."""
    for name, path in footprint_modules.files(footprint_modules.own()).items():
        before = compile(path.read_bytes(), str(path), "exec", dont_inherit=True, optimize=0)
        after = marshal.loads(footprint_compile.compiled(path)[16:])  # noqa: S302 - what was just compiled
        assert [one.co_name for one in codes(after)] == [one.co_name for one in codes(before)], name
        assert {one.co_flags for one in codes(after)} == {one.co_flags for one in codes(before)}, name


def test_a_source_that_is_none_stops_the_making_of_an_initramfs(tmp_path: Path) -> None:
    """And is named: a module that is missing shows at the next boot only."""
    broken = tmp_path / "broken.py"
    broken.write_text("def (:\n")
    config = tmp_path / "agent.toml"
    config.write_text(
        'vm_id = "web1"\n[[verifiers]]\nname = "home"\nurls = ["http://kagi.example"]\n'
        'keys = ["AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="]\n'
    )
    into = tmp_path / "into"
    into.mkdir()
    footprint = Footprint(Path(sys.executable), (), (broken,), frozenset({broken}), ())
    with pytest.raises(ImageError) as caught:
        install(footprint, into, load(config), config)
    assert caught.value.code == "footprint.copy"
    assert f"{broken}: SyntaxError" in (caught.value.found or "")
    broken.write_text("x = 1\n")
    install(replace(footprint, files=(broken,)), into, load(config), config)
    assert list(into.rglob("broken.pyc"))


def test_what_is_frozen_into_the_interpreter_is_not_carried() -> None:
    """No import looks at its file; but by os.py the interpreter finds where it is."""
    assert set(
        footprint_modules.files(["codecs", "os", "json", "importlib._bootstrap", "importlib.util"])
    ) == {"os", "json"}
