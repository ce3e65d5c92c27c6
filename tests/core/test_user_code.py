"""Importing user code: what an error names."""

import re

import pytest

from vtprune_train.core.user_code import load


@pytest.mark.parametrize(
    "name, line, said",
    [
        ("unknown_name", "missing_name", "NameError: name 'missing_name' is not defined"),
        ("wrong_type", "len(1)", "TypeError: object of type 'int' has no len()"),
        ("no_key", "{}['key']", "KeyError: 'key'"),
        ("in_library", "import json; json.loads('')", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("raises", "raise ValueError('no')", "ValueError: no"),
    ],
)
def test_an_exception_at_import_names_setting_file_and_line(tmp_path, name, line, said):
    file = tmp_path / f"fails_{name}.py"
    file.write_text(f"x = 1\n\n{line}\n")
    path = f"{file}:Mine"
    with pytest.raises(ValueError) as caught:
        load(path, "train.schedule")
    assert str(caught.value) == f"train.schedule={path!r} cannot be imported ({file}, line 3): {said}"
    assert caught.value.__cause__ is not None


def test_a_missing_import_of_a_file_is_explained_for_files(tmp_path):
    file = tmp_path / "imports_nothing.py"
    file.write_text("import no_such_package_here\n")
    said = (
        f"cannot be imported ({file}, line 1): No module named 'no_such_package_here'; install the missing "
        "package, or put the missing module into the folder of the file"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        load(f"{file}:Mine", "callbacks.0")


def test_a_missing_module_is_explained_without_a_line():
    with pytest.raises(ValueError, match=r"cannot be imported: No module named 'no'; add the package's folder to PYTH"):
        load("no.such:Mine", "callbacks.0")


def test_a_file_with_dots_in_its_name_is_refused(tmp_path):
    (tmp_path / "my.best.py").write_text("class Best:\n    pass\n")
    with pytest.raises(ValueError, match=r"my\.best\.py cannot be imported, .*; rename it to my_best\.py"):
        load(f"{tmp_path}/my.best.py:Best", "callbacks.0")
