"""Logs as JSON lines on stderr. Nothing secret is ever handed to a logger, and bytes are not printed even then.

A line that cannot be written is lost, and whoever logged it goes on: guests are answered, or refused, whether or not the
disk behind stderr is full or the reader of its pipe has gone. What must not be lost is in the ledger.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Final, TextIO, cast

import structlog

_SHARED: Final = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)


class _Stderr(io.TextIOBase):
    """Stderr as it is when a line is written: whoever has replaced it since is followed. Never raises OSError."""

    def write(self, text: str) -> int:
        """Write to it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush it."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def to_stderr() -> None:
    """Send our logs, and the libraries' warnings, to stderr, one JSON object a line."""
    # The TSS would write a line of its own for each structure that it refuses, and guests choose what they send.
    os.environ.setdefault("TSS2_LOG", "all+none")
    stderr = cast("TextIO", _Stderr())
    structlog.configure(
        processors=[*_SHARED, structlog.processors.JSONRenderer(default=_unprinted)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(stderr),
        cache_logger_on_first_use=False,  # so that a later configuration holds for loggers used before it
    )
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=_unprinted),
            ],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *_SHARED],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _unprinted(value: object) -> str:
    """Stand in for a value that JSON cannot hold: bytes may be a key, and an object may hold one."""
    return f"<{type(value).__name__}>"
