"""Which lines of the parsers the corpora reach: every input of a target once more, under ``coverage``, without the engine.

It counts lines and branches of Python. libFuzzer's edges say how a run grows; this says what it has not seen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

from tests.fuzz.workshop import ROOT, STATE


def main(name: str) -> None:
    """Print the coverage of one target's modules, as reached by its seeds and its corpus."""
    os.environ["TSS2_LOG"] = "all+none"
    import coverage

    data = STATE / f"coverage.{name}"
    # Started before anything of ours is imported, so that the lines of definitions count as reached.
    measured = coverage.Coverage(
        data_file=str(data),
        branch=True,
        source_pkgs=["kagimori_protocol", "kagimori_agent", "kagimori_verifier"],
    )
    measured.start()
    from tests.fuzz.target import accepts
    from tests.fuzz.targets.names import load

    target = load(name)
    corpus = STATE / "corpus" / name
    kept = sorted(corpus.iterdir()) if corpus.is_dir() else []
    accepted = 0
    seeds = list(target.seeds())
    for one in [*seeds, *(path.read_bytes() for path in kept)]:
        accepted += accepts(target, one)
    measured.stop()
    files = [
        spec.origin for module in target.covers if (spec := importlib.util.find_spec(module)) and spec.origin
    ]
    shown = io.StringIO()
    with contextlib.chdir(ROOT):
        measured.report(include=files, file=shown, show_missing=True)
    print(f"{name}: {len(seeds)} seeds and {len(kept)} of the corpus, {accepted} accepted")
    print(shown.getvalue().replace(f"{ROOT}{os.sep}", ""))
    data.unlink(missing_ok=True)
    Path(f"{data}-journal").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
