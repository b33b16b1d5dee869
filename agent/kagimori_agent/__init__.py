"""The agent: it lives in the initramfs, shows what was booted, gets the disk's key, and makes sure nobody asks again.

Import budget of this module: nothing. Every module of the agent states its own.
"""

from typing import Final

VERSION: Final = "0.1.0.dev0"
"""Kept equal to pyproject.toml by a test: asking ``importlib.metadata`` costs a boot more than it is worth."""
