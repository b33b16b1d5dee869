"""Compile Python's sources as an initramfs carries them: without docstrings, and without columns in tracebacks.

    python -IS -X no_debug_ranges footprint_compile.py < PAIRS

PAIRS is a JSON array of [source, where the compiled file goes]. A process of its own, since only the interpreter's option
leaves the columns out. Assertions stay, unlike under -OO: libraries may rely on them, and a check costs no size worth
having. Each file is the one that an import finds without a source (PEP 3147), and is never checked against a source that is
not there (PEP 552, unchecked).

Exit codes: 0 all written; 1, with a line that says why, when a source cannot be compiled or a file not be written.
Import budget: ``ast``, ``importlib.util``, ``json``.
"""

from __future__ import annotations

import ast
import json
import marshal
import sys
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

_UNCHECKED = (1).to_bytes(4, "little")
"""PEP 552: a hash in place of the source's date, and nobody compares it."""


def main() -> int:
    """Compile what standard input names; returns the exit code."""
    for source, target in json.load(sys.stdin):
        try:
            Path(target).write_bytes(compiled(Path(source)))
        except (OSError, SyntaxError, ValueError) as error:
            sys.stderr.write(f"{source}: {type(error).__name__}: {error}\n")
            return 1
    return 0


def compiled(path: Path) -> bytes:
    """Give the content of a source's compiled file. Raises OSError, SyntaxError, ValueError."""
    source = path.read_bytes()
    tree = _Undocumented().visit(ast.parse(source, str(path)))
    code = compile(tree, str(path), "exec", dont_inherit=True, optimize=0)
    return MAGIC_NUMBER + _UNCHECKED + source_hash(source) + marshal.dumps(code)


class _Undocumented(ast.NodeTransformer):
    """Takes docstrings away, but for a sign of one at a class with a decorator.

    A dataclass without any would write one at each import, from a signature, which takes longer than reading it.
    """

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            first = ast.Expr(ast.Constant("-")) if node.decorator_list else ast.Pass()
            node.body[0] = ast.copy_location(ast.fix_missing_locations(first), node.body[0])
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._shorten(node)
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        self._shorten(node)
        return node

    def _shorten(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.copy_location(ast.Pass(), node.body[0])


if __name__ == "__main__":
    sys.exit(main())
