"""Estimates and measurements of GPU memory."""
