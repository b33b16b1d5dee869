"""Which lines of the parsers the corpora reach: every input of the targets once more, under ``coverage``, without the engine.

It counts lines and branches of Python. libFuzzer's edges say how a run grows; this says what it has not seen.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".dev" / "fuzz"
"""As in ``workshop``, which would import what is to be measured before that begins."""


def main(names: list[str]) -> None:
    """Print the coverage of the targets' modules, as reached by their seeds and corpora together."""
    os.environ["TSS2_LOG"] = "all+none"
    import coverage

    warnings.simplefilter("ignore", coverage.exceptions.CoverageWarning)  # of modules that no target needs
    packages = ["kagimori_protocol", "kagimori_agent", "kagimori_verifier"]
    # Started before anything of ours is imported, so that the lines of definitions count as reached.
    measured = coverage.Coverage(data_file=None, branch=True, source_pkgs=packages)
    measured.start()
    from tests.fuzz.target import accepts
    from tests.fuzz.targets.names import load

    modules: set[str] = set()
    for name in names:
        target = load(name)
        modules |= set(target.covers)
        corpus = STATE / "corpus" / name
        kept = sorted(corpus.iterdir()) if corpus.is_dir() else []
        seeds = list(target.seeds())
        accepted = sum(accepts(target, one) for one in [*seeds, *(path.read_bytes() for path in kept)])
        print(f"{name}: {len(seeds)} seeds and {len(kept)} of the corpus, {accepted} accepted")
    measured.stop()
    specs = [importlib.util.find_spec(module) for module in sorted(modules)]
    shown = io.StringIO()
    measured.report(
        include=[spec.origin for spec in specs if spec is not None and spec.origin],
        file=shown,
        show_missing=True,
    )
    print(shown.getvalue().replace(f"{ROOT}{os.sep}", ""))


if __name__ == "__main__":
    main(sys.argv[1:])
