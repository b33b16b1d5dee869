"""docs/conformance.md is run: its commands do what it says, with the other agent and the other verifier as the reader's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

import msgspec
import pytest

from kagimori_protocol import messages

HERE: Final = Path(__file__).parent
PROTOCOL: Final = (HERE.parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
DOCUMENT: Final = (HERE.parent.parent / "docs" / "conformance.md").read_text(encoding="utf-8")
BLOCKS: Final = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
TIMEOUT_S: Final = 240
PRELUDE: Final = f"""
export PATH={Path(sys.executable).parent}:$PATH
kv() {{ python -m kagimori_verifier "$@"; }}
ks() {{ python -m kagimori_simulator.cli "$@"; }}
value() {{ python -c "import json, sys; print($1)" <"${{2:-/dev/stdin}}"; }}
"""
"""Stands for the aliases, and reads what a reader would."""
READ: Final = (
    # A person starts a server and sees that it listens before going on.
    (r"^kv serve &$", "kv serve 2>serve.log & until grep -q 'listening on' serve.log; do sleep 0.2; done"),
    (r"^\./my-verifier .* &$", "MATCH until [ -s where ]; do sleep 0.2; done"),
    (
        r"^SESSION=\.\.\. .*$",
        """SESSION=$(kv ledger list --json |
            value "next(line['session'] for line in json.load(sys.stdin) if line['event'] == 'refused')")""",
    ),
    (
        r"^URL=\.\.\. KEY=\.\.\. .*$",
        """URL=$(value "json.load(sys.stdin)['url']" where)
        KEY=$(value "json.load(sys.stdin)['public_key']" where)""",
    ),
    (r"^alias .*$", ""),
)
"""What the document leaves to its reader: how its line looks, and what is typed in its place."""


def structs(kind: object) -> Iterator[type[msgspec.Struct]]:
    """Find the structs in a field's type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for part in get_args(kind):
        yield from structs(part)


def fields(struct: type[msgspec.Struct]) -> set[str]:
    """Name the fields of a message and of what is in it as protocol.md does: optional ones with a question mark."""
    own = msgspec.structs.fields(struct)
    named = {field.name + "?" * (not field.required) for field in own}
    return named.union(*(fields(inside) for field in own for inside in structs(field.type)))


@pytest.mark.parametrize("message", messages.Message.__subclasses__(), ids=lambda one: one.__name__)
def test_the_protocol_names_every_field_of_a_message_and_whether_it_may_be_absent(
    message: type[messages.Message],
) -> None:
    """Somebody who writes another implementation has nothing but the table."""
    row = re.search(rf"^\| `{message.__struct_config__.tag}` \| (.*) \|$", PROTOCOL, re.MULTILINE)
    assert row
    wanted = fields(message) - {"version"}
    named = set(re.findall(r"`(\w+\??)`", row[1])) - {"enc", "00000000"}
    assert named == wanted


def free_port() -> str:
    """Give a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def typed() -> str:
    """Give the document's commands as a script, with what is left to its reader filled in."""
    text = "\n".join(BLOCKS)
    for pattern, replacement in READ:
        found = re.findall(pattern, text, re.MULTILINE)
        assert found, pattern
        for line in found:
            text = text.replace(line, replacement.replace("MATCH", line))
    return PRELUDE + text.replace("8117", free_port()).replace("8118", free_port())


def test_the_document_has_the_blocks_that_are_typed_here() -> None:
    """One to prepare, one for each kind, one for another verifier; nothing of them is left open."""
    assert len(BLOCKS) == 4
    assert "..." not in typed()


@pytest.mark.slow
def test_a_reader_who_types_what_the_document_says_gets_what_it_says(tmp_path: Path) -> None:
    """From an empty directory to keys: another agent with our verifier, of both kinds, and our agent with another verifier."""
    for name in ("agent", "verifier", "seal"):
        (tmp_path / f"my-{name}").symlink_to(HERE / f"independent_{name}.py")
    command = ["bash", "-eu", "-o", "pipefail", "-c", typed()]
    with (tmp_path / "told").open("wb") as told:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=told, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # its own group: the servers that it left running
    said = (tmp_path / "told").read_text()
    assert code == 0, said
    agents = [json.loads(line) for line in said.splitlines() if line.startswith('{"allowed"')]
    assert [(one["allowed"], len(one["proved"])) for one in agents] == [(True, 1), (False, 0), (True, 1)]
    assert "confirmed-opened" in said
    assert "cryptroot: proved" in said
    assert said.count("confirmed received\n") == said.count("confirmed opened\n") == 1
