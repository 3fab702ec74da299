# make setup     .venv with exactly pinned versions (requirements.txt), the package itself in editable form
# make demo      set up, then the whole job on real text: corpus, tokenizer, shards, training, export, report
# make test      set up where needed, then the fast tests      (what is slower: make test-all)
# make lint      ruff and mypy
#
# PYTHON=python3.12 make setup   chooses the interpreter (3.11 or newer).
# TORCH="torch==2.13.0 --index-url URL" make setup   chooses another build of torch, such as one for your CUDA.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: setup demo test test-all lint clean

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up is done again, not believed. The torch that is there is a
# constraint (-c): pip would else replace it without a word where a pinned version does not go with it.
$(STAMP): requirements.txt setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loopmem needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	@echo "== setting up $(VENV) with $$($(PYTHON) --version): torch, then everything pinned in requirements.txt"
	@rm -f $(STAMP)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); echo "cannot create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 6; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) \
	    || { echo "cannot install $(TORCH): check the network and the package index (pip config list), then run make again"; exit 6; }
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | grep '^torch==' >$(VENV)/torch.txt
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c $(VENV)/torch.txt \
	    || { echo "cannot install requirements.txt beside $$(cat $(VENV)/torch.txt): check the network and free disk space (2 GB), then run make again"; exit 6; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@echo "== ready: . $(BIN)/activate; loopmem --help"

demo: $(STAMP)
	@$(BIN)/loopmem demo

# Two files at a time (tests/conftest.py): many tests wait, for a process to end or a time limit to pass.
PYTEST := $(BIN)/python -m pytest -q -n 2

test: $(STAMP)
	@$(PYTEST) -m "not slow"

test-all: $(STAMP)
	@$(PYTEST)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
