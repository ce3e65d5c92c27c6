"""Tests run offline and on a CPU."""

import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Two test processes share the cores: more threads wait for each other, and take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("repeatable", derandomize=True, print_blob=True)
settings.load_profile("repeatable")
sys.path.insert(0, str(Path(__file__).parent))
