# Everything runs in .venv, made from nothing by the first target that needs it. `make` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
# 1: a machine with an NVIDIA driver. Set GPU=1 to install for GPUs where none is, such as a cluster's login node. What
# was installed stays, so that later targets need not say it again.
INSTALLED := $(shell cat .venv/.ok 2>/dev/null)
GPU ?= $(or $(INSTALLED),$(shell nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0))
LOCK := requirements/$(if $(filter 1,$(GPU)),gpu,cpu).txt
INSTALL := GPU=$(GPU) PYTHON=$(PYTHON) requirements/install.sh
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
BROWSER_PACKAGES := chromium chromium-driver
# `slurm` are all of them; the slow ones are part of `make test-full`.
SLURM_TESTS ?= slurm and not slow
SLURM_FILES ?= tests/slurm
# Tests that run at once, whole files each, in the order of tests/conftest.py; each also starts processes of its own.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=2 $(BIN)/python -m pytest
SHARED_OPTIONS := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SHARED := OMP_NUM_THREADS=1 $(BIN)/python $(SHARED_OPTIONS)
FAST := -m "not slow and not gpu and not slurm and not browser and not kernels"
# The tests of what reaches into other libraries, or leans on how they behave.
INSIDES := tests/config tests/hf tests/doctor/test_packages.py tests/doctor/test_libraries.py \
	tests/data/test_hf_tokenizer.py tests/data/test_shard_writer.py tests/data/test_shards.py \
	tests/data/test_prefetch.py tests/data/test_shard_build.py tests/data/test_storage.py \
	tests/data/test_tokenizer.py tests/parallel/tensor/test_regions.py tests/parallel/tensor/test_layers.py \
	tests/parallel/zero/test_engine.py tests/parallel/zero/test_partitions.py tests/parallel/zero/test_state.py \
	tests/train/logging/test_wandb_log.py
# Of the locks: empty keeps the versions that still fit pyproject.toml.
UPGRADE ?= --upgrade
UV := $(BIN)/uv pip compile --quiet --python-version 3.11 --annotation-style line --custom-compile-command 'make lock'
COMPILE := $(UV) pyproject.toml
NO_CUDA := --excludes requirements/cuda.txt
NO_TRITON := --excludes requirements/triton.txt

.DEFAULT_GOAL := help
.PHONY: help install train rule110 test test-full test-slurm test-browser test-docker test-wheel test-kernels gpu-report docs check check-latest check-lowest lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.ok ## make .venv and install the package for this machine (CPU or CUDA)

train: install ## the whole way: text, two processes that are killed and go on, a task where sleep helps, export, a page
	$(BIN)/python tools/first_run.py

rule110: install ## the smallest proof: more passes, more of a row that is gone
	$(BIN)/python tools/rule110.py

test: install ## the fast tests
	$(SHARED) $(FAST)

test-full: install ## all tests; those that need a GPU skip themselves without one
	$(SHARED) -m "not gpu and not slurm and not browser and not kernels"
	$(TEST) -m "gpu or slurm or browser"

test-slurm: install ## the batch scripts on a local Slurm cluster, installed where you are root on Debian or Ubuntu
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ls /usr/sbin/slurmctld /usr/sbin/slurmd /usr/sbin/munged /usr/bin/sbatch >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); \
	fi
	$(TEST) $(SLURM_FILES) -m "$(SLURM_TESTS)"

test-browser: install ## a report in Chromium, which is installed where you are root on Debian or Ubuntu
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ls /usr/bin/chromium /usr/bin/chromedriver >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER_PACKAGES); \
	fi
	SLEEPTRAIN_BROWSER_TESTS=1 $(TEST) tests/report -m browser

test-docker: install ## build the container image on a stand-in base and train in it (root, buildah, mmdebstrap)
	docker/check.sh

test-wheel: install ## build the wheel, and train with it in an environment of its own
	requirements/check_wheel.sh .venv

test-kernels: .venv-kernels/.ok ## flash-linear-attention's Triton kernels against fp64, interpreted on the CPU, in .venv-kernels
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-kernels/bin/python $(SHARED_OPTIONS) -m kernels tests/kernels tests/gpu/test_step.py tests/gpu/test_loss.py

gpu-report: install ## what a GPU says in ten minutes: kernels against fp64, tests, tokens/s, a profile; runs/gpu_report
	@$(BIN)/python -c "import fla" 2>/dev/null || echo "without flash-linear-attention there is little to report: make GPU=1 install" >&2
	$(BIN)/python tools/gpu_report.py

check-latest: ## the newest permitted versions of all packages, in .venv-latest: the tests that reach into them
	$(INSTALL) .venv-latest latest
	OMP_NUM_THREADS=1 .venv-latest/bin/python $(SHARED_OPTIONS) $(FAST) $(INSIDES)

check-lowest: ## the same with the lowest, in .venv-lowest
	$(INSTALL) .venv-lowest requirements/lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(SHARED_OPTIONS) $(FAST) $(INSIDES)

lock: install ## the newest permitted versions into requirements/; UPGRADE= keeps those that still fit
	$(COMPILE) $(UPGRADE) --extra dev --universal --fork-strategy fewest $(NO_CUDA) $(NO_TRITON) -o requirements/cpu.txt
	$(COMPILE) $(UPGRADE) --extra dev --extra gpu --universal --fork-strategy fewest --constraints requirements/cpu.txt \
		-o requirements/gpu.txt
	$(COMPILE) $(UPGRADE) --extra dev --resolution lowest-direct $(NO_CUDA) $(NO_TRITON) -o requirements/lowest.txt
	$(COMPILE) $(UPGRADE) --extra gpu --universal --fork-strategy fewest --constraints requirements/gpu.txt $(NO_CUDA) \
		requirements/kernels.in -o requirements/kernels.txt
	$(UV) $(UPGRADE) --universal --fork-strategy fewest --constraints requirements/cpu.txt requirements/docs.in \
		-o requirements/docs.txt

check: install ## lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --failure-threshold warning docker/Dockerfile

docs: install .venv-docs/.ok ## the documents as a site, links and spelling checked: build/docs/index.html
	@.venv-docs/bin/codespell README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff docs configs slurm sleeptrain tools tests
	@.venv-docs/bin/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going -c docs -d build/doctrees . build/docs
	@echo build/docs/index.html

clean: ## remove .venv and the like, caches and builds; runs/ and data/ stay
	rm -rf .venv .venv-latest .venv-lowest .venv-kernels .venv-docs build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: an install that was cut short is done again. One for the other kind of machine is made anew.
.venv/.ok: pyproject.toml $(LOCK) requirements/install.sh $(if $(filter-out $(GPU),$(INSTALLED)),anew)
	@$(INSTALL) .venv $(LOCK)
	@echo $(GPU) > $@

# For the CPU, also beside a GPU: the interpreter needs none.
.venv-kernels/.ok: pyproject.toml requirements/kernels.txt requirements/install.sh
	@GPU=0 PYTHON=$(PYTHON) requirements/install.sh .venv-kernels requirements/kernels.txt
	@touch $@

# Sphinx by itself; it reads the docstrings of the package in .venv, whose versions of shared packages it has.
.venv-docs/.ok: requirements/docs.txt .venv/.ok
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(.venv-docs/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/package.pth
	@touch $@

.PHONY: anew
anew:
	rm -rf .venv
