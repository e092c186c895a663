# On a fresh machine with Python 3.11 or later: `make demo` and `make test`. The README has the
# same as plain commands.
PYTHON ?= python3
BIN = .venv/bin
# The CPU build of torch. For a GPU: make PIP_FLAGS= demo
PIP_FLAGS ?= --extra-index-url https://download.pytorch.org/whl/cpu

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(PIP_FLAGS) -r requirements-dev.txt -c constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/python data/toy/prepare.py
	$(BIN)/python data/sample.py
	$(BIN)/python train_asker.py
	$(BIN)/python train_truster.py
	$(BIN)/python evaluate.py
	$(BIN)/python docs/plot.py runs/toy/default

# The run of the demo has seed 0. Finished work is not done again.
seeds: demo
	for seed in 1 2; do \
	  $(BIN)/python train_asker.py --run seed$$seed --seed $$seed && \
	  $(BIN)/python train_truster.py --run seed$$seed --seed $$seed && \
	  $(BIN)/python evaluate.py --run seed$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python evaluate.py --compare default seed1 seed2

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.PHONY: demo seeds test
