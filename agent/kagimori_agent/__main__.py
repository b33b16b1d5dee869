"""``python -m kagimori_agent`` is ``kagimori-agent``."""

import sys

from kagimori_agent.cli import main

sys.exit(main())
