# Each target sets up what it needs. Only Python 3.11 or newer, make and a base Linux are assumed.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4
CHECKED := tests/test_import_direction.py tests/test_docs.py
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check bench

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Undercroft needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'No virtual environment without ensurepip: apt-get install python3-venv'; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@touch $(STAMP)

demo: install
	$(BIN)/undercroft demo

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS) --dist loadfile $(addprefix --ignore=,$(CHECKED))

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) $(CHECKED)

bench: install
	$(BIN)/undercroft bench store
	$(BIN)/undercroft bench train
	$(BIN)/undercroft bench kernels
	$(BIN)/undercroft bench overlap
	$(BIN)/undercroft bench prefetch
	$(BIN)/undercroft bench quality
