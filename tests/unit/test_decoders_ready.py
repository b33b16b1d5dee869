"""Whatever several threads may read at once was looked at by msgspec before there were threads.

msgspec learns what it must know of a class when it first reads one, in several steps, and another thread that reads one
meanwhile dies of SIGSEGV, and the process with it. A verifier's first requests may come all at once.
"""

from __future__ import annotations

import subprocess
import sys

READ_ONCE = {
    # By the only thread that the program has by then.
    "kagimori_agent.config": "agent.toml",
    "kagimori_agent.confirm": "a Confirm that was kept, by the verb that sends it",
    "kagimori_verifier.settings": "verifier.toml",
}
PROGRAM = """
import gc
import msgspec
import kagimori_agent.unlock, kagimori_agent.exchange, kagimori_verifier.app, kagimori_verifier.serving

def below(kind):
    for one in kind.__subclasses__():
        yield one
        yield from below(one)

for one in below(msgspec.Struct):
    ready = any(type(known).__name__ == "StructInfo" for known in gc.get_referents(one))
    if one.__module__.startswith("kagimori") and not one.__subclasses__():
        print(one.__module__, one.__name__, ready)
"""


def test_no_class_is_first_looked_at_by_a_request() -> None:
    """Importing the programs has prepared every class but those of files that one thread reads, once."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    ready = {name for module, name, is_ready in found if is_ready == "True"}
    late = {(module, name) for module, name, is_ready in found if is_ready == "False"}
    assert {"Evidence", "Hello", "SignedChallenge", "Policy", "_Typed"} <= ready
    assert {one for one in late if one[0] not in READ_ONCE} == set()
    assert late, "the look at a class tells those that are ready from those that are not"
