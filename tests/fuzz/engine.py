"""One fuzzer, one process: ``python -m tests.fuzz.engine TARGET CORPUS... -FLAG=...``, started by ``run``.

atheris instruments the Python of the three rooms, branch by branch and comparison by comparison. What is native (msgspec,
cryptography, the TSS, json's scanner) is not instrumented: chance is led through our own code and is blind inside theirs.
"""

from __future__ import annotations

import atexit
import os
import random
import shlex
import signal
import sys
import warnings

INSTRUMENTED = ["kagimori_protocol", "kagimori_agent", "kagimori_verifier", "tests.fuzz.targets"]
"""The targets too: what they ask of a parsed value tells one input from another where the parser is native."""

SLOWER = 8.0
"""How much slower instrumented code may be than the bounds say, on a machine that does other things too."""


def main() -> None:
    """Fuzz until libFuzzer's flags say that it is enough."""
    # The TSS writes a line about each structure that it refuses.
    os.environ["TSS2_LOG"] = "all+none"
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.target import accepts_within
        from tests.fuzz.targets.names import load

        name = sys.argv.pop(1)
        target = load(name)
    # What libFuzzer starts again, through a shell, to merge corpora.
    sys.argv[0] = f"{shlex.quote(sys.executable)} -m tests.fuzz.engine {name}"
    # A warning is for a person; what a sender can cause is an error with a name, or nothing.
    warnings.simplefilter("error")

    def one(data: bytes) -> None:
        accepts_within(target, data, slower=SLOWER)

    def mutated(data: bytes, limit: int, seed: int) -> bytes:
        assert target.mutate is not None
        return target.mutate(data, limit, random.Random(seed), atheris.Mutate)[:limit]

    # libFuzzer's timer runs on while the interpreter ends, when nobody handles its signal any more.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    atheris.Setup(sys.argv, one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
