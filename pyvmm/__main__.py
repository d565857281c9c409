"""``python -m pyvmm``."""

from __future__ import annotations

import sys

from pyvmm.cli import main

sys.exit(main())
