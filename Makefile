# make quickstart   the main job on an embedded default: a tiny model, two CPU ranks, a few minutes
# make test         the tests; those of other packages run after `make ecosystem` (TRL, PEFT, lmms-eval, ...)
# make gpu          on a machine with a GPU: the tests that need one, then scripts/gpu_check.py (under 7 minutes)
# All create .venv when it is missing. PYTHON names another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_ECOSYSTEM := $(VENV)/.ready-ecosystem
export HF_HUB_OFFLINE ?= 1

ECOSYSTEM_CONSTRAINTS := $(VENV)/.installed.txt

.PHONY: quickstart compare test gpu ecosystem lint format bench docs clean

quickstart: $(READY)
	$(BIN)/python scripts/quickstart.py

compare: $(READY)
	$(BIN)/python scripts/quickstart.py --compare

test: $(READY_DEV)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

gpu: $(READY_DEV)
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python scripts/gpu_check.py

ecosystem: $(READY_ECOSYSTEM)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python scripts/bench.py --device cpu --geometry small

docs: $(READY_DEV)
	$(BIN)/sphinx-build -W -b html docs site

clean:
	rm -rf $(VENV) runs site

$(READY): requirements.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(READY_DEV): $(READY) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(READY_ECOSYSTEM): $(READY_DEV) requirements-ecosystem.txt
	$(BIN)/python -m pip freeze --exclude-editable > $(ECOSYSTEM_CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(ECOSYSTEM_CONSTRAINTS) --requirement requirements-ecosystem.txt
	$(BIN)/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@
