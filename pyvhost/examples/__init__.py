"""Devices to learn from and to measure with, each a program of its own: ``python -m pyvhost.examples.null_block``."""
