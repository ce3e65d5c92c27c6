# make quickstart   train a tiny model on synthetic images with two CPU ranks: a few minutes
# make compare      train the same model with PyramidDrop and dense, side by side
# make test         run the tests; `make ecosystem` adds those with TRL, PEFT, lmms-eval and others
# make test-fast    run only the fast tests, before every commit: a few minutes
# make test-floor   run the version-dependent tests with the oldest supported versions, in .venv-floor (5 GB with CUDA)
# make peers        run the tests with ms-swift and LLaMA-Factory, in .venv-peers (2 GB without CUDA)
# make gpu          on a machine with a GPU: run the tests that need one, then scripts/gpu_check.py (under 7 minutes)
# make settings     write docs/settings.md and the comments of configs/ from the descriptions of the settings
# Each target creates its virtual environment if it is missing. PYTHON sets another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_ECOSYSTEM := $(VENV)/.ready-ecosystem
FLOOR := .venv-floor
READY_FLOOR := $(FLOOR)/.ready
PEERS := .venv-peers
READY_PEERS := $(PEERS)/.ready
export HF_HUB_OFFLINE ?= 1

ECOSYSTEM_CONSTRAINTS := $(VENV)/.installed.txt
# Tests that depend on the versions of PyTorch, transformers, DeepSpeed and PEFT.
FLOOR_TESTS := $(addprefix tests/,core/test_stream.py models/families/test_families.py \
	models/families/test_loop_families.py models/families/test_qwen3_5.py models/forward/test_attention.py \
	models/forward/test_compile.py::test_compiled_once_and_equal models/forward/test_head.py integrations/test_batches.py \
	models/io/test_build.py models/io/test_in_pieces.py models/io/test_peft.py models/test_equivalence.py models/test_generate.py \
	models/test_golden.py models/test_prune.py models/test_rank_by.py models/test_trained.py models/test_waits.py \
	models/video/test_packed_videos.py pruning/methods/test_combinations.py \
	pruning/methods/test_contract.py pruning/methods/test_encoder.py pruning/methods/test_keys.py \
	training/engine/test_private.py training/memory/test_allocator.py training/test_runs.py)

.PHONY: quickstart compare test test-fast test-floor peers gpu ecosystem lint format bench settings docs clean

quickstart: $(READY)
	$(BIN)/vtprune quickstart

compare: $(READY)
	$(BIN)/vtprune quickstart --compare

test: $(READY_DEV)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: $(READY_DEV)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

test-floor: $(READY_FLOOR)
	$(FLOOR)/bin/python -m pytest --numprocesses 2 --dist worksteal $(FLOOR_TESTS)

peers: $(READY_PEERS)
	PYTHONPATH=$(CURDIR)/tests/support/cpu_torchvision $(PEERS)/bin/python -m pytest tests/integrations/test_peers.py

gpu: $(READY_DEV)
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python scripts/gpu_check.py

ecosystem: $(READY_ECOSYSTEM)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python scripts/bench.py --device cpu --geometry small

settings: $(READY_DEV)
	$(BIN)/python scripts/write_settings.py

docs: $(READY_DEV)
	$(BIN)/sphinx-build -W -b html docs site

clean:
	rm -rf $(VENV) $(FLOOR) $(PEERS) runs site

$(READY): requirements.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(READY_DEV): $(READY) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(READY_FLOOR): requirements-floor.txt
	test -d $(FLOOR) || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --requirement requirements-floor.txt
	touch $@

# Without its compiled library, torchaudio can be imported beside any build of PyTorch.
$(READY_PEERS): requirements-peers.txt
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement requirements-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps llamafactory==0.9.5 torchvision==0.28.0 torchaudio==2.11.0
	rm -rf $(PEERS)/lib/python3*/site-packages/torchaudio/lib
	touch $@

$(READY_ECOSYSTEM): $(READY_DEV) requirements-ecosystem.txt requirements-gpu.txt
	$(BIN)/python -m pip freeze --exclude-editable > $(ECOSYSTEM_CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(ECOSYSTEM_CONSTRAINTS) --requirement requirements-ecosystem.txt
	$(BIN)/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchao --upgrade \
		$$(sed -n 's/^\(torchao==[^ ]*\).*/\1/p' requirements-gpu.txt)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision --upgrade torchvision==0.28.0
	touch $@
