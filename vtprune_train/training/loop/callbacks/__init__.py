"""The shipped callbacks. ``build.py`` gives their order."""
