"""Load requests without what it would load beside and the agent never uses, and without its doubts about IPv6.

requests does without what guesses the encoding of a text where that is not installed, and says so; here bodies are bytes.
Left in, it would be one of the larger parts of an initramfs (with Python's tables of Chinese, Japanese and Korean encodings,
which it loads) and of what a boot waits for.

Import budget: nothing; requests is what is loaded.
"""

from __future__ import annotations

import sys
import warnings
from typing import Final

LEFT_OUT: Final = ("chardet", "charset_normalizer")
"""Python's own way to say that a module is not there: no module under its name (importlib, "The import system", 5.3.1)."""


def load_requests() -> None:
    """Load it; costs nothing once it is loaded."""
    for name in LEFT_OUT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None is how to say so
    warnings.filterwarnings("ignore", message="Unable to find acceptable character detection")
    import requests  # noqa: F401, PLC0415 - not before the lines above
    import urllib3.util.connection  # noqa: PLC0415 - as above

    # Loaded, urllib3 asks once whether ::1 can be bound; in an initramfs that is before the loopback has it, and no name or
    # address of a verifier would be looked up for IPv6 in this boot. The kernel refuses by itself where there is none.
    urllib3.util.connection.HAS_IPV6 = True
