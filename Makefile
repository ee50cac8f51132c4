# Each target does all its own set-up: a virtual environment in .venv with the locked versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench check docs docs-serve reference format clean

demo: $(READY)
	$(BIN)/fidelora demo

# Two processes (TEST_PROCESSES=0: one, and prints appear); threads that wait without spinning, as the processes share the cores.
TEST_PROCESSES ?= 2
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal --durations 25

# Against diffusers with PEFT, which is installed for this alone; BENCH="--only switch" or BENCH=--quick for less than 20 minutes.
bench: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m benchmarks.run $(BENCH)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.reference --check
	$(MAKE) --no-print-directory docs

# Strictly: a link or an anchor that leads nowhere, or a page that is in no menu, ends it. Not with -q, which drops the warnings.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --livereload --dev-addr 127.0.0.1:8001

# The pages, and the tables of docs/cli.md, that are made from the code.
reference: $(READY)
	$(BIN)/python -m tools.reference

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis fidelora-demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[server,client,ui]" --group dev --group docs
	touch $@
