"""``python -m retool.cli``."""

import sys

from retool.cli import main

sys.exit(main())
