"""The failure tables of the docs."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "faults.md"


def table_rows():
    """The rows of all tables whose last column names tests."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        header, _, *rows = table.splitlines()
        if header.endswith("| test |"):
            yield from (row.split(" | ") for row in rows)


def test_every_row_names_tests_that_are_there():
    rows = list(table_rows())
    assert len(rows) > 60
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[-1])
        assert names, row
        file = names[0].partition("::")[0]
        for name in names:
            path, _, function = name.partition("::")
            assert f"def {function}" in (HERE / (path or file)).read_text(), name
