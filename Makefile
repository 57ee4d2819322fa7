# Everything that is done with this repository, one target each. `make help` lists them.
#
# The virtual environment sees the distribution's packages, because the eBPF bindings (python3-bpfcc) exist only there;
# so it is made by the distribution's Python. Two stamps say what it holds: .runtime for `make run`, .dev for the tests.

PYTHON ?= /usr/bin/python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_INPUTS := pyproject.toml hatch_build.py exporter/monitors/runtimes/cri.proto

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-kernels check golden bench clean system test-system

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

run: system $(VENV)/.runtime ## Install what is missing and run the exporter in the foreground (ARGS="--log.level debug")
	$(BIN)/cni-exporter run $(ARGS)

# Continuous integration runs the kernel tests on other kernels, too.
EVERYTHING := $(if $(filter true,$(CI)),-m '')

test: test-system check ## Install what is missing, check the code, run every test (PYTEST_ARGS="-k links")
	$(BIN)/python -m pytest -ra $(EVERYTHING) $(PYTEST_ARGS)

test-kernels: system $(VENV)/.dev ## Run the kernel tests on Debian's kernels in QEMU (PYTEST_ARGS="-k 6.12")
	@tests/install kernels
	$(BIN)/python -m pytest -ra -m kernels $(PYTEST_ARGS) tests/real/test_kernels.py

check: $(VENV)/.dev ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

golden: $(VENV)/.dev ## Renew the golden files; review the difference before you keep it
	$(BIN)/python -m pytest tests/golden --renew-golden

bench: $(VENV)/.dev ## Measure cost against a reference on this machine; writes build/bench.json
	@tests/install bench
	$(BIN)/python tests/bench/run.py
	$(BIN)/python tests/bench/programs.py
	$(BIN)/python tests/bench/decisions.py
	$(BIN)/python tests/bench/flooded.py

clean: ## Remove everything that make and the tests produced, the virtual environment too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find exporter tests -name '*_pb2*.py*' -delete
	find exporter tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Checked at each call: what is there costs milliseconds, and an earlier call may not have been root's.
system:
	@deploy/install $(PYTHON)

test-system: system
	@tests/install

$(VENV)/bin/pip:
	@deploy/install $(PYTHON)
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)

$(VENV)/.runtime: $(BUILD_INPUTS) | $(VENV)/bin/pip
	@echo "installing Python packages into $(VENV)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(BUILD_INPUTS) | $(VENV)/bin/pip
	@echo "installing Python packages into $(VENV)"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.runtime $@
