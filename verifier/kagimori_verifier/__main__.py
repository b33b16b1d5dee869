"""``python -m kagimori_verifier`` is ``kagimori-verifier``."""

import sys

from kagimori_verifier.cli import main

sys.exit(main())
