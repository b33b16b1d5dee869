"""Run kagimori-agent with a watch on its parts; prints one JSON object: seconds by part.

    python -m bench.agent_driver STARTED ARGS...

STARTED is the monotonic time at which whoever started this process did so: what comes before the first line here is the
interpreter's own start. The agent itself loads some of its libraries while the network answers; here all of them are loaded
first, so that loading can be told from the rest. The agent's own output goes to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import threading
import time
from collections import defaultdict
from typing import Any, Final

PARTS: Final = {
    "TPM": (
        (
            "kagimori_agent.devices.vtpm",
            "Vtpm",
            ("make_keys", "random", "quote", "activate", "event_log", "close"),
        ),
        ("kagimori_agent.unlock", None, ("cap_boot",)),
    ),
    "report": (("kagimori_agent.devices.configfs_tsm", "ConfigfsTsm", ("service_report", "plain_report")),),
    "network": (("kagimori_agent.exchange", None, ("ask_all", "post")),),
    "cryptsetup": (("kagimori_agent.luks", None, ("open_volume",)),),
}
LOADED: Final = (
    "kagimori_agent.cli",
    "kagimori_agent.unlock",
    "kagimori_agent.devices.vtpm",
    "kagimori_agent.devices.configfs_tsm",
    "requests",
)


def main() -> int:
    """Load, run, tell."""
    entered = time.monotonic()
    for name in LOADED:
        importlib.import_module(name)
    spent: dict[str, float] = defaultdict(float)
    spent["interpreter"] = entered - float(sys.argv[1])
    spent["import"] = time.monotonic() - entered
    inside = threading.local()

    def watched(function: Any, part: str) -> Any:  # noqa: ANN401 - any of PARTS
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes and gives
            if getattr(inside, "part", None):
                return function(*arguments, **named)
            inside.part, began = part, time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] += time.monotonic() - began
                inside.part = None

        return timed

    for part, places in PARTS.items():
        for module, owner, names in places:
            place = importlib.import_module(module)
            if owner is not None:
                place = getattr(place, owner)
            for name in names:
                setattr(place, name, watched(getattr(place, name), part))
    cli = importlib.import_module("kagimori_agent.cli")
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        code: int = cli.main(sys.argv[2:])
    spent["rest"] = time.monotonic() - began - sum(spent[part] for part in PARTS)
    json.dump(spent, sys.stdout)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
