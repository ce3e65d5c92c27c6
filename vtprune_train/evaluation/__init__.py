"""Answers questions about images and reports on the answers."""
