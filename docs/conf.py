"""Sphinx settings: `make docs`."""

project = "vtprune-train"
author = "the vtprune-train authors"
extensions = ["myst_parser"]
exclude_patterns = ["benchmarks/*.json"]
html_theme = "alabaster"
myst_heading_anchors = 3
