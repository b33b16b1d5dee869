"""Start the project's programs as processes of their own that can end themselves at a chosen point.

Run as ``python -m tests.faults.launcher``. It loads the programs' modules once and forks one process for each request, so
that hundreds of verifiers and agents can be started and killed in the time that a few would take. What runs in such a
process is the program's own ``main`` with its own arguments, behind the failpoints of ``tests.faults.failpoints``.

Requests are JSON lines on stdin, answers JSON lines on stdout. Single-threaded, or it could not fork.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from tests.faults import failpoints

PROGRAMS = {"verifier": "kagimori_verifier.cli", "agent": "kagimori_agent.cli"}
LOADED_LATER = (
    "kagimori_agent.cap",
    "kagimori_agent.devices.configfs_tsm",
    "kagimori_agent.devices.vtpm",
    "kagimori_agent.memory",
    "kagimori_agent.signals",
    "kagimori_agent.unlock",
    "kagimori_verifier.app",
    "kagimori_verifier.logs",
    "kagimori_verifier.serving",
    "alembic.command",
    "alembic.config",
    "requests",
    "uvicorn.loops.auto",
)
"""What the programs load when a verb needs it."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
FAILED = 70
"""Exit code of a program that ended by an exception, which none ever should."""


def main() -> None:
    """Serve requests until stdin ends."""
    for module in (*PROGRAMS.values(), *LOADED_LATER):
        importlib.import_module(module)
    _answer({"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _answer({"code": os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])})
            continue
        pid = os.fork()
        if pid == 0:
            _become(request)
        _answer({"pid": pid})


def _answer(message: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _become(request: dict[str, Any]) -> None:
    """Turn this fork into the program; never returns."""
    code = FAILED
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number, (path, flags) in enumerate(
            (
                (request["stdin"], os.O_RDONLY),
                (request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                (request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            )
        ):
            os.dup2(os.open(path, flags, 0o600), number)
        os.closerange(3, 64)
        failpoints.arm(**request["failpoints"])
        code = importlib.import_module(PROGRAMS[request["program"]]).main(request["arguments"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - a traceback is what a test looks for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
