# Everything here needs only make and Python 3.11 or newer. The first target that needs it makes the environment in .venv;
# another interpreter: make PYTHON=python3.13 test

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif

ENVIRONMENT := .venv/made

.DEFAULT_GOAL := help
.PHONY: help demo test wan chaos fuzz lm-eval check lint types bench docs notebooks site

help:
	@echo "make demo    a private swarm on this machine, and a chat with it; Ctrl-C ends it"
	@echo "make test    all tests"
	@echo "make wan     tests on emulated home routers; needs root on Linux"
	@echo "make chaos   a soak of an hour: servers die while clients speak; CHAOS='--minutes 5'"
	@echo "make fuzz    made-up bytes against what reads those of peers; installs atheris; FUZZ=-max_total_time=3600"
	@echo "make lm-eval other people's clients against the gateway; installs lm-eval, which is large"
	@echo "make check   lint, types and tests: what a change must pass"
	@echo "make lint    style, format and the direction of imports"
	@echo "make types   the type checker"
	@echo "make bench   the benchmarks, one table each"
	@echo "make docs    the generated pages of docs/"
	@echo "make notebooks  the notebooks of examples/, from its scripts"
	@echo "make site    the documentation as a site, in build/site"

# The shell outlives a Ctrl-C, so that the demo may end in its own way; 130 is how a program says that it was interrupted.
demo: $(ENVIRONMENT)
	@trap : INT; $(BIN)/corolla demo || { status=$$?; [ $$status -eq 130 ] || exit $$status; }

test: $(ENVIRONMENT)
	$(BIN)/python -m pytest -n auto --dist loadfile

wan: $(ENVIRONMENT)
	EMULATE_WAN=1 $(BIN)/python -m pytest -p no:randomly tests/wan  # in order: later tests break what earlier ones use

# Random stories in a network in memory first, then processes.
chaos: $(ENVIRONMENT)
	$(BIN)/python -m pytest tests/unit/client/test_chaos.py --hypothesis-profile=long --timeout=0
	$(BIN)/python -m bench.chaos --minutes 60 --clients 20 --every 20 $(CHAOS)

fuzz: $(ENVIRONMENT)
	$(BIN)/python -m pip install --disable-pip-version-check --only-binary :all: atheris
	$(BIN)/python tests/property/fuzz.py $(or $(FUZZ),-max_total_time=60)

lm-eval: $(ENVIRONMENT)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt 'lm-eval[api]'
	$(BIN)/python -m pytest tests/swarm/gateway/test_lm_eval.py
	$(BIN)/python -m bench sdks

check: lint types test

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(ENVIRONMENT)
	$(BIN)/mypy

bench: $(ENVIRONMENT)
	$(BIN)/python -m bench

docs: $(ENVIRONMENT)
	$(BIN)/python docs/generate.py

notebooks: $(ENVIRONMENT)
	$(BIN)/python examples/notebooks.py

site: $(ENVIRONMENT)
	$(BIN)/mkdocs build --strict

$(ENVIRONMENT): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; v < (3, 11) and sys.exit('Corolla needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.12' % v[:2])"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[torch,quantized,tuning,examples,gateway,postgresql,monitor,redis,docs,dev]"
	-$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --only-binary libtorrent -e ".[dht]"
	@touch $@
