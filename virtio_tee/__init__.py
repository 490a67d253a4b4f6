"""The face of the project: the ``virtio-tee`` command, the only place that wires the rooms together."""

__version__ = "0.1.0"
