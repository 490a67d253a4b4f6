"""What ``setup.cfg`` cannot say: the compiled queue, built where a C compiler and Python's headers are. A failed build
is no error: pyvhost then runs its queues in Python."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pyvhost.vring._fastqueue",
            ["pyvhost/vring/_fastqueue.c"],
            extra_compile_args=["-O2", "-std=gnu11", "-fno-strict-aliasing"],
            optional=True,
        )
    ]
)
