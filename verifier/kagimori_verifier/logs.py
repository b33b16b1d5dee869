"""Logs as JSON lines on stderr. Nothing secret is ever handed to a logger."""

from __future__ import annotations

import logging
import sys

import structlog


def to_stderr() -> None:
    """Send structured logs, and the libraries' warnings, to stderr."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format='{"event": "library", "text": "%(message)s"}'
    )
