"""The failure table of the docs."""

import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parent.parent / "docs" / "faults.md"


def test_every_row_names_tests_that_are_there():
    rows = [
        line.split(" | ") for line in TABLE.read_text().partition("\n## ")[0].splitlines() if line.startswith("| ")
    ][1:]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[-1])
        assert names, row
        file = names[0].partition("::")[0]
        for name in names:
            path, _, function = name.partition("::")
            assert f"def {function}" in (HERE / (path or file)).read_text(), name
