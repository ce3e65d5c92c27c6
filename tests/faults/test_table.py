"""The tables of docs/faults.md: each row names its tests in a comment."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "faults.md"
HEADER = "| fault | what happens | what to do |\n"


def rows():
    for table in PAGE.read_text().split(HEADER)[1:]:
        yield from table.partition("\n\n")[0].splitlines()[1:]


def test_every_row_names_tests_that_are_there():
    assert len(list(rows())) > 60
    for row in rows():
        names = re.fullmatch(r"\|.*<!-- (.+) --> \|", row)
        assert names, row
        file = ""
        for name in names[1].split(", "):
            path, _, function = name.partition("::")
            file = file or path
            assert f"def {function}" in (HERE / (path or file)).read_text(), name
