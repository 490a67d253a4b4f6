# make demo   the main job on the software TEE          (15 seconds the first time, then 1)
# make test   all tests that need no VM                 (about 2 minutes)
# make help   the rest

PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo /usr/bin/python3 || echo python3)
VENV := .venv
RUN := $(VENV)/bin/python
# of tests/lab/test_optee.py, what make lab-optee has: guests on the software TEE
NOT_SHORT := $(addprefix --deselect tests/lab/test_optee.py::,test_a_guest_in_the_host test_a_killed_guest)
READY := $(VENV)/.ready

.PHONY: help demo test long-test check lab-test lab-qemu-linux lab-uml lab-optee docs clean

help:
	@echo 'make demo      run the main job: a guest calls TAs of the software TEE, TAs loaded over RPC'
	@echo 'make test      unit, property, fuzz and process tests'
	@echo 'make long-test  1,000,000 fuzzed FF-A calls with a check of every page after each; 6,000 rounds of OCALLs'
	@echo '               that end badly; backends killed 100 times'
	@echo 'make check     lint (ruff), formatting, types (mypy --strict), generated documentation'
	@echo 'make lab-test  boot a real guest under a QEMU built from source (cached after the first time)'
	@echo 'make lab-qemu-linux  build the kernel driver, run checkpatch on it, and try it in guests (x86-64, arm64)'
	@echo 'make lab-uml   the part of it that runs under user-mode-linux, with the kernel driver (first time: 2 minutes)'
	@echo 'make lab-optee  real OP-TEE, by SMC and by FF-A, in an arm64 machine; a guest VM in it'
	@echo 'make docs      generate the tables of the documentation, and the man page, from the code'
	@echo 'make clean     remove the virtual environment and caches of this folder'

# Sets up a virtual environment in this folder; PYTHON may name another interpreter, of version 3.11 or newer.
$(READY): setup.cfg pyproject.toml setup.py pyvhost/vring/_fastqueue.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(PYTHON) -m lab.hostdeps --for base
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(RUN) -m virtio_tee demo

test: $(READY)
	$(RUN) -m pytest -q

long-test: $(READY)
	$(RUN) -m ffa.fuzz 1000000
	$(PYTHON) -m lab.hostdeps --for lab
	$(RUN) -m pytest -q -m long
	VIRTIO_TEE_LONG=1 $(RUN) -m pytest -q -m lab tests/lab/test_unpatched_qemu.py

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) docs/generate.py --check
	$(RUN) docs/manpage.py --check

lab-test: $(READY)
	$(PYTHON) -m lab.hostdeps --for optee
	$(RUN) -m lab.qemu build
	$(RUN) -m lab.qemu build --target aarch64-softmmu
	$(RUN) -m lab.qemu qtest
	$(RUN) -m lab.qemu checkpatch
	$(RUN) -m lab.qemu image
	$(RUN) -m lab.qemu image --arch aarch64
	$(RUN) -m lab.qemu module
	$(RUN) -m lab.uml image
	$(RUN) -m lab.optee build --stack smc45
	$(RUN) -m pytest -q -m lab tests/lab tests/virtio_tee $(NOT_SHORT)

lab-qemu-linux: $(READY)
	$(PYTHON) -m lab.hostdeps --for lab
	$(RUN) -m lab.qemu module
	$(RUN) -m lab.qemu build --target aarch64-softmmu
	$(RUN) -m lab.qemu module --arch aarch64
	$(RUN) -m pytest -q -m lab tests/lab/test_linux_driver.py tests/lab/test_linux_hostile.py \
		tests/lab/test_linux_fuzz.py
	VIRTIO_TEE_ARCH=aarch64 $(RUN) -m pytest -q -m lab tests/lab/test_linux_driver.py tests/lab/test_linux_arm64.py

UML_TESTS = tests/lab/test_uml.py tests/lab/test_uml_linux.py

lab-uml: $(READY)
	$(PYTHON) -m lab.hostdeps --for lab
	$(RUN) -m lab.uml image
	$(RUN) -m pytest -q -m lab -k "not (pure or entropy or backend_on_tee0 or many_guests or kill or broker or no_such_device or dies_while)" $(UML_TESTS)

lab-optee: $(READY)
	$(PYTHON) -m lab.hostdeps --for optee
	$(RUN) -m lab.qemu build --target aarch64-softmmu
	$(RUN) -m lab.optee build
	VIRTIO_TEE_STACKS="smc45 smc410 ffa410+stats" $(RUN) -m pytest -q -m lab tests/lab/test_optee.py
	$(RUN) -m lab.optee xtest

docs: $(READY)
	$(RUN) docs/generate.py
	$(RUN) docs/manpage.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
