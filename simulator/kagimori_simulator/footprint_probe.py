"""Run the agent's command line, then write down what this process had loaded: a program, run by its path.

``python -P footprint_probe.py RECORD VERB ...``: RECORD gets one JSON object with ``modules`` (names that were
imported, or tried: a package may live with a module that refuses to load, and not with one that is missing),
``opened`` (files that Python code opened to read) and ``mapped`` (shared libraries, from /proc/self/maps). It imports
nothing that the agent does not: what it looks with was there before it looked.
"""

from __future__ import annotations

import sys

OPENED: set[str] = set()
TRIED: set[str] = set()


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import":
        TRIED.add(str(arguments[0]))
    elif (
        event == "open"
        and isinstance(arguments[0], str)
        and isinstance(arguments[2], int)
        and not arguments[2] & 3
    ):
        OPENED.add(arguments[0])


def _record(path: str, modules: list[str]) -> None:
    import json  # noqa: PLC0415 - only once what was loaded is known

    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 - pathlib may not be loaded yet
        fields = [line.split() for line in maps]
    mapped = sorted({line[5] for line in fields if len(line) > 5 and ".so" in line[5]})  # noqa: PLR2004 - proc(5): pathname is the sixth
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123 - as above
        json.dump({"modules": modules, "opened": sorted(OPENED), "mapped": mapped}, file)


def main() -> int:
    """Run the agent; gives its exit code."""
    record, *arguments = sys.argv[1:]
    sys.addaudithook(_listen)
    from kagimori_agent.cli import main as agent  # noqa: PLC0415 - after the hook listens

    try:
        return agent(arguments)
    finally:
        # What the agent has put aside (``kagimori_agent.lean``) was asked for, and is not there.
        aside = {name for name in list(sys.modules) if sys.modules.get(name) is None}
        _record(record, sorted((TRIED | set(sys.modules)) - aside))


if __name__ == "__main__":
    sys.exit(main())
