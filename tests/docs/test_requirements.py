"""The requirement files agree with each other and with pyproject.toml."""

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from vtprune_train.cli.commands import EXTRAS
from vtprune_train.training.engine.private import PINNED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]
DEPENDENCIES = {
    canonicalize_name(wanted.name): wanted.specifier
    for wanted in map(Requirement, [*PROJECT["dependencies"], *EXTRA["train"], *EXTRA["viz"]])
}


def pins(file):
    """{name: version} of a file in which every line names one release."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    pinned = {}
    for wanted in (Requirement(line) for line in lines if line):
        [exact] = wanted.specifier
        assert exact.operator == "==", f"{file}: {wanted}"
        pinned[canonicalize_name(wanted.name)] = Version(exact.version)
    return pinned


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_the_floor_is_the_lowest_that_pyproject_allows(name):
    pin = pins("requirements-floor.txt")[name]
    lowest = [Version(bound.version) for bound in DEPENDENCIES[name] if bound.operator == ">="]
    assert lowest in ([], [pin])


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_the_tested_set_is_allowed_by_pyproject(name):
    assert pins("requirements.txt")[name] in DEPENDENCIES[name]


def test_the_floor_differs_from_the_tested_set_where_pyproject_names_a_lowest_release_alone():
    floor, tested = pins("requirements-floor.txt"), {**pins("requirements.txt"), **pins("requirements-dev.txt")}
    differing = {name for name, pin in floor.items() if pin != tested[name]}
    assert differing == {name for name, bounds in DEPENDENCIES.items() if bounds} | {"setuptools"}


def test_the_deepspeed_pin_is_the_one_that_its_private_names_were_looked_up_in():
    assert PINNED in EXTRA["train"]


def test_every_package_of_an_extra_is_named_when_it_is_missing():
    distributions = {canonicalize_name(Requirement(line).name) for extra in ("train", "viz") for line in EXTRA[extra]}
    modules_of = packages_distributions()
    modules = [module for modules in EXTRAS.values() for module in modules]
    assert distributions <= {canonicalize_name(name) for module in modules for name in modules_of[module]}
    assert all(distributions & set(map(canonicalize_name, modules_of[module])) for module in modules)
