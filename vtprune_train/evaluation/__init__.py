"""Answering questions about images, and what is reported about the answers."""
