# `make demo` and `make test` need nothing but Python 3.11+ and a network; everything goes into .venv.

PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
PYTEST := $(VENV)/bin/python -m pytest --timeout 600
SIZE   := $(if $(FULL),,and not slow)

.PHONY: help install check test roads evidence bench bench-full demo clean

help:
	@echo "make demo      upgrade the model behind a real table, and go back (5 minutes)"
	@echo "make test      unit, phases, command line, one road of each kind (FULL=1: full size too)"
	@echo "make roads     every scenario down every road: kill, resume, abort, roll back"
	@echo "make check     ruff and mypy --strict"
	@echo "make bench     ratios against a baseline measured in the same run"
	@echo "make bench-full  what an application notices, at 1 and 5 million rows (an hour or more)"
	@echo "make evidence  full-size proofs; needs REVECTOR_DATA=<folder>"
	@echo "make install   only set up .venv"
	@echo "make clean     remove .venv and everything else that was made"

install: $(STAMP)

# Made anew only when what is to be installed has changed. One resolver call, so that the parts agree.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "revector needs Python 3.11 or newer; \
	$(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" % v[:2])'
	@echo "setting up $(VENV) (about 3 minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[local,embedded,openai]' --group dev
	@touch $@

check: $(STAMP)
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check . && echo "ruff: no complaints"
	@$(VENV)/bin/mypy --strict

test: $(STAMP)
	@$(PYTEST) tests -m "not roads $(SIZE)"

roads: $(STAMP)
	@$(PYTEST) tests -m "roads $(SIZE)"

evidence:
	@test -n "$(REVECTOR_DATA)" || { echo "make evidence needs the data: make evidence REVECTOR_DATA=<folder>"; exit 2; }
	@test -d "$(REVECTOR_DATA)" || { echo "REVECTOR_DATA=$(REVECTOR_DATA) is not a folder"; exit 2; }
	@$(MAKE) --no-print-directory install
	@REVECTOR_DATA="$(REVECTOR_DATA)" $(VENV)/bin/python benchmarks/evidence.py

bench: $(STAMP)
	@$(VENV)/bin/python benchmarks/bench.py

bench-full: $(STAMP)
	@for rows in 1000000 5000000; do echo "== $$rows rows"; $(VENV)/bin/python benchmarks/serving.py $$rows hash:8 hash:16 || exit; done

demo: $(STAMP)
	@$(VENV)/bin/revector demo

clean:
	@rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
