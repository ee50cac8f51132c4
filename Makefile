# Each target first creates .venv, a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test faults fuzz soak bench bench-gpu check docs docs-serve reference lock format clean

demo: $(READY)
	$(BIN)/fidelora demo

# Runs in three processes, because many tests wait for a server; TEST_PROCESSES=0 uses one and shows
# prints. OMP_WAIT_POLICY=passive: waiting threads do not spin, because the processes share the cores.
TEST_PROCESSES ?= 3
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal --durations 25 \
		--ignore tests/faults

# Kills servers and workers, fills disks, and sends hostile files and requests. 100 rounds of each
# fault take about an hour; FAULT_ROUNDS=10 FAULT_REQUESTS=100 takes less. The last three
# files have the faults of clocks, of single workers and of connections; `make test` runs them, too.
FAULT_ROUNDS ?= 100
FAULT_REQUESTS ?= 1000
FAULTS ?= tests/faults tests/workers/test_pool.py tests/server/test_background.py \
	tests/server/test_connections.py
faults: $(READY)
	OMP_WAIT_POLICY=passive FAULT_ROUNDS=$(FAULT_ROUNDS) FAULT_REQUESTS=$(FAULT_REQUESTS) \
		$(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal --durations 25 $(FAULTS)

# Two hours of random requests and kills; SOAK="--minutes 20" takes less.
soak: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.soak $(SOAK)

# Fuzzes the readers of untrusted files and texts with atheris (Linux only), each for this time.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS := safetensors_header parameters flags recipe
fuzz: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --group fuzz
	for target in $(FUZZ_TARGETS); do $(BIN)/python -m tests.faults.fuzz.run $$target $(FUZZ_SECONDS) || exit 1; done

# Compares with diffusers and PEFT (installed only for this) and takes about 20 minutes.
# BENCH="--only switch" or BENCH=--quick takes less.
bench: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m benchmarks.run $(BENCH)

# The first table of a machine with a GPU: exactness, images, steps, compiling, switches, memory.
bench-gpu: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m benchmarks.gpu $(BENCH)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.reference --check
	$(MAKE) --no-print-directory docs

# --strict: broken links, broken anchors and pages missing from the menu are errors. Do not add -q, which
# drops the warnings that --strict counts.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --livereload --dev-addr 127.0.0.1:8001

# Generates docs/reference, docs/models/index.md, the tables of docs/cli.md, and the table by which a
# server recognises the family of a LoRA, from the code.
reference: $(READY)
	$(BIN)/python -m tools.module_shapes
	$(BIN)/python -m tools.reference

# Writes the locked requirements of the container images, with the hashes of the package index.
# LOCK="--torch-cpu FOLDER" takes torch for CPUs from a folder of wheels.
lock: $(READY)
	$(BIN)/python -m tools.lock $(LOCK)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis fidelora-demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[server,client,ui,postgres,s3,wan,video]" \
		--group dev --group docs --group deploy --group object-store
	touch $@
