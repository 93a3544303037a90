# One obvious command each. `make demo` and `make test` do their own set-up on a fresh Debian machine.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests share two cores with the servers they start, so no more workers than cores.
WORKERS ?= 2

.PHONY: demo test judges bench soak fuzz lint format peers clean help

help:            ## Show this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/'

demo: $(VENV)/.node   ## Set up, then run node, archive and a simulated camera on this machine
	$(BIN)/remnant demo $(DEMO)

test: $(VENV)/.dev peers lint   ## Set up, then lint and run every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone" $(TESTS)
	$(BIN)/python -m pytest -m alone $(TESTS)

judges: $(VENV)/.dev peers   ## Every kind of result before every validator, PixelMed's too (half an hour)
	@tests/install-judges
	$(BIN)/python -m pytest -n $(WORKERS) -q tests/hospital/judges/full_matrix.py

bench: $(VENV)/.dev peers   ## Measure speed and memory beside a peer
	$(BIN)/python -m pytest -q -s tests/hospital/end_to_end/bench_scan_to_result.py tests/pipeline/bench_analysis.py tests/hospital/end_to_end/bench_receiving.py

soak: $(VENV)/.dev peers   ## Send thousands of objects through a node and look for what grows: SOAK_OBJECTS=10000 SOAK_MINUTES=240
	$(BIN)/python -m pytest -q -s tests/hospital/end_to_end/soak_*.py
	POWER_CUTS=20 KILL_POINTS=1 $(BIN)/python -m pytest -q tests/hospital/end_to_end/test_power_cut.py tests/hospital/end_to_end/test_kill_points.py
	LOCK_S=60 $(BIN)/python -m pytest -q tests/hospital/end_to_end/test_people_at_the_node.py -k write_lock

fuzz: $(VENV)/.dev   ## Feed every parser of the wire with broken bytes: FUZZ_S=600 FUZZ_SEED=1
	$(BIN)/python -m pytest -q -s tests/dicom_node/fuzz_parsers.py

lint: $(VENV)/.dev   ## ruff, mypy (strict), import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev   ## Let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

peers:           ## Install what the tests talk to (DCMTK, Orthanc with DICOMweb, PostgreSQL, sqlite3, Chromium, OHIF by npm); needs root
	@tests/install-peers

# torch has to come by plain pip and its exact pin (see CONTRIBUTING.md).
$(VENV)/.node: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.node
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:           ## Remove the environment and what tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
