# `make demo` and `make test` are all a newcomer needs; both prepare the machine first.

PYTHON := .venv/bin/python
SOURCES := pyvmm devices enlightenments guests tests
BUILD_EXT := $(PYTHON) -W ignore -c 'import setuptools; setuptools.setup()' -q build_ext
STRICT_C := -Wshadow -Wstrict-prototypes -Wvla -Wformat=2 -Wundef -Wpointer-arith
# Whether this host's own KVM can run VMs.
VMS_RUN := $(PYTHON) -m pyvmm doctor >/dev/null 2>&1
# One test may wait for a whole stock guest in an emulated machine.
LAB_SECONDS := 1800

.PHONY: help setup ext demo test test-quick check check-c bench fuzz clean

help:
	@echo 'make setup       install what is missing: from Debian, from PyPI (.venv), the C extension'
	@echo 'make demo        the probe on /dev/kvm, then a stock Debian guest with its disk on VMBus'
	@echo 'make test        all suites: unit, kvm (bare-metal guests), lab (stock guests)'
	@echo 'make test-quick  the same without the lab'
	@echo 'make check       ruff, mypy, import-linter, C warnings'
	@echo 'make bench       speed and memory, as ratios to QEMU and to bare C'
	@echo 'make fuzz        MSRs and hypercalls: C under sanitizers, Hypothesis, a guest; SECONDS=600, SEED=N'
	@echo 'make clean       remove what was built here, but neither .venv nor downloaded kernels'

setup:
	@tools/setup.sh

ext: .venv/.extension

.venv/.extension: pyproject.toml $(wildcard pyvmm/core/hot/*.c pyvmm/core/hot/*.h)
	$(BUILD_EXT) --force --inplace
	@touch $@

demo: setup
	@$(PYTHON) -m guests.demo

test: setup
	@if $(VMS_RUN); then \
		$(PYTHON) -m pytest; \
	else \
		echo 'no usable /dev/kvm here: the kvm suite runs inside the lab'; \
		$(PYTHON) -m guests.lab --timeout $(LAB_SECONDS) -- $(PYTHON) -m pytest -p no:cacheprovider tests/kvm && \
		$(PYTHON) -m pytest tests/unit tests/lab; \
	fi

test-quick: setup
	@if $(VMS_RUN); then \
		$(PYTHON) -m pytest tests/unit tests/kvm; \
	else \
		echo 'no usable /dev/kvm here: the kvm suite is left out (make test runs it inside the lab)'; \
		$(PYTHON) -m pytest tests/unit; \
	fi

check: setup check-c
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

check-c: setup
	@build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
		CFLAGS='$(STRICT_C)' $(BUILD_EXT) --force --build-lib="$$build" --build-temp="$$build"

bench: setup
	@$(PYTHON) -m tests.bench

fuzz: setup
	@$(PYTHON) -m tests.fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf build results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf pyvmm/core/_hot.*.so .venv/.extension
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
