"""The suite lies beside the package, not in it: a bare ``pytest`` would not find it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
