"""The owner's command line. Administration works on the database directly; only ``serve`` answers guests."""

from kagimori_verifier.cli.main import main

__all__ = ["main"]
