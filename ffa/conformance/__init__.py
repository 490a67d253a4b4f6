"""Conformance of FF-A implementations: cases named after the public suites, and defects that they must find."""
