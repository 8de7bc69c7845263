# Everything runs in .venv, made from nothing by the first target that needs it. `make` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
# 1: a machine with an NVIDIA driver. Set GPU=1 to install for GPUs where none is, such as a cluster's login node.
GPU ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0)
CPU_INDEX := https://download.pytorch.org/whl/cpu
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
# `slurm` are all of them; the slow ones are part of `make test-full`.
SLURM_TESTS ?= slurm and not slow
SLURM_FILES ?= tests/slurm
# Tests that run at once, whole files each; each also starts processes of its own.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=2 $(BIN)/python -m pytest
SHARED := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install train rule110 test test-full test-slurm test-docker check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.ok ## make .venv and install the package for this machine (CPU or CUDA)

train: install ## train a small sleeping model on Python's standard library and draw its curves
	$(BIN)/python tools/prepare.py --stdlib --out data/stdlib
	$(BIN)/sleeptrain train experiment=stdlib
	$(BIN)/sleeptrain report runs/stdlib

rule110: install ## the smallest proof: more passes, more of a row that is gone
	$(BIN)/python tools/rule110.py

test: install ## the fast tests
	$(SHARED) -m "not slow and not gpu and not slurm"

test-full: install ## all tests; those that need a GPU skip themselves without one
	$(SHARED) -m "not gpu and not slurm"
	$(TEST) -m "gpu or slurm"

test-slurm: install ## the batch scripts on a local Slurm cluster, installed where you are root on Debian or Ubuntu
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ls /usr/sbin/slurmctld /usr/sbin/slurmd /usr/sbin/munged /usr/bin/sbatch >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); \
	fi
	$(TEST) $(SLURM_FILES) -m "$(SLURM_TESTS)"

test-docker: install ## build the container image on a stand-in base and train in it (root, buildah, mmdebstrap)
	docker/check.sh

check: install ## lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/hadolint --failure-threshold warning docker/Dockerfile

clean: ## remove .venv, caches and builds; runs/ and data/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: an install that was cut short is done again.
.venv/.ok: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sleeptrain needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
ifeq ($(GPU),1)
	$(BIN)/python -m pip install -e '.[dev,gpu]'
else
	@# PyPI's torch for Linux brings 3 GB of CUDA; pytorch.org has the same version without, unless pip was told of another place.
	@index=; \
	if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -m pip config list | grep find-links >/dev/null; then \
		index="--extra-index-url $(CPU_INDEX)"; \
	fi; \
	set -x; $(BIN)/python -m pip install $$index -e '.[dev]'
	@packages=$$($(BIN)/python -m pip list 2>/dev/null | awk '$$1 ~ /^(nvidia-|triton$$)/ { print $$1 }'); \
	if [ -n "$$packages" ]; then \
		echo "CUDA packages were installed on a machine without a GPU:" $$packages >&2; \
		echo "Remove .venv and point pip at a CPU build of torch (PIP_FIND_LINKS or $(CPU_INDEX)), or run make GPU=1 install" >&2; \
		exit 1; \
	fi
endif
	@touch $@
