#!/usr/bin/env python
"""Check the project against recorded outputs of published code.

    python scripts/check_golden.py DIR

Each pair NAME.json + NAME.safetensors in DIR (``"format": "vtprune-golden-1"``) is one test case for PyramidDrop's
decoder or for another method. One line is printed per case: ``ok`` if all values are equal within the tolerances,
``differs`` if only documented differences occur, otherwise ``FAIL``. Exits with 0 if no case fails, 1 if one does, 2 if
one cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from golden_checks import methods, pyramiddrop
from golden_checks.common import CaseError, Outcome, read_case


def run_case(folder: Path, name: str) -> Outcome:
    """Read one case and check it.

    Raises:
        CaseError: if the case cannot be read.
    """
    case = read_case(folder, name)
    if case.entries.get("format") == methods.FORMAT:
        return methods.run_case(case)
    if "format" not in case.entries and "layer_list" in case.entries:
        return pyramiddrop.run_case(case)
    raise CaseError(f"format {case.entries.get('format')!r} is neither {methods.FORMAT!r} nor a case of PyramidDrop's")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds NAME.json and NAME.safetensors pairs")
    folder = parser.parse_args(argv).folder
    names = sorted({path.stem for suffix in ("json", "safetensors") for path in folder.glob(f"*.{suffix}")})
    if not names:
        print(f"{folder} holds no golden cases (NAME.json + NAME.safetensors)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    outcomes, unread = [], 0
    for name in names:
        try:
            outcomes.append(run_case(folder, name))
            print(outcomes[-1])
        except CaseError as error:
            unread += 1
            print(f"ERROR   {name}: {error}", file=sys.stderr)
    failed = sum(not outcome.passed for outcome in outcomes)
    different = sum(outcome.passed and bool(outcome.differing) for outcome in outcomes)
    equal = len(outcomes) - failed - different
    print(f"{equal} of {len(names)} equal, {different} differ as documented, {failed} differ, {unread} cannot be read")
    return 2 if unread else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
