"""Tests below this folder use the helpers beside the others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
