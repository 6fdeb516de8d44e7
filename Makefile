# make demo and make test set up everything they need in .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(PYTHON)
NOTEBOOK := .venv-notebook
NOTEBOOK_PYTHON ?= python3.13
BROWSER := $(VENV)/.browser

.PHONY: demo test test-oldest test-notebook test-processors test-gpu lint bench release clean
.DELETE_ON_ERROR:

$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# A browser for the tests of the report; where none can be had, they are skipped and say so.
$(BROWSER): $(READY)
	{ command -v "$${FEATX_BROWSER:-chromium}" || command -v google-chrome \
	|| { test -n "$$CI" && apt-get update && apt-get install --yes --no-install-recommends chromium; } \
	|| $(BIN)/playwright install chromium; } >/dev/null 2>&1 && touch $@ \
	|| echo "No browser: the tests that need one will be skipped."

# make demo [PHOTOS=folder of class subfolders] [BACKBONE=name] [WEIGHTS=name or file]
demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(BACKBONE),--backbone "$(BACKBONE)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

# make test PYTEST_ARGS="-k orientation"
# Two processes of one thread each: most tests are too small to keep two threads busy.
test: $(READY) $(BROWSER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# The same with the oldest releases that setup.cfg admits, which have wheels for Python 3.11 and 3.12.
$(OLDEST)/.ready: setup.cfg pyproject.toml constraints/oldest.txt
	@$(OLDEST_PYTHON) -c "import sys; sys.exit(sys.version_info > (3, 13) and 'Python 3.11 or 3.12 is expected. Set OLDEST_PYTHON to one.')"
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints/oldest.txt --editable ".[test]"
	touch $@

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 $(PYTEST_ARGS)
	test ! -x $(BIN)/python || OMP_NUM_THREADS=1 $(BIN)/python constraints/check_store.py $(OLDEST)/bin/python

# On top of what a hosted notebook service has, of which nothing may be replaced; needs Python 3.13.
$(NOTEBOOK)/.ready: constraints/notebook.txt
	test -x $(NOTEBOOK)/bin/python || $(NOTEBOOK_PYTHON) -m venv $(NOTEBOOK)
	$(NOTEBOOK)/bin/python -m pip install --quiet --requirement constraints/notebook.txt
	$(NOTEBOOK)/bin/python -m pip install --quiet --constraint constraints/notebook.txt pytest pytest-timeout pytest-xdist hypothesis polars packaging
	touch $@

test-notebook: $(NOTEBOOK)/.ready
	$(NOTEBOOK)/bin/python constraints/check_notebook.py
	$(NOTEBOOK)/bin/python -m pip install --quiet --constraint constraints/notebook.txt --editable .
	OMP_NUM_THREADS=1 $(NOTEBOOK)/bin/python -m pytest -n 2 tests/test_extractor.py tests/test_fine_tuning.py \
		tests/test_cache.py tests/test_sklearn_checks.py tests/test_store.py $(PYTEST_ARGS)

# What can depend on the processor and on the number of threads, as on older and other ones.
# MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors alone, MKL_CBWR on all.
NUMERIC := tests/test_sklearn_checks.py tests/test_extractor.py tests/test_fine_tuning.py tests/test_fine_tuning_tools.py \
	tests/test_split.py tests/test_taps.py tests/test_folding.py tests/test_pooling.py tests/test_reference.py \
	tests/test_scikit_learn_tools.py tests/test_preprocessing.py tests/test_decoding.py tests/test_cache.py tests/test_tokens.py \
	tests/test_foreign.py tests/test_finite.py tests/test_round_trips.py tests/test_depth.py
AVX2 := MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2
SSE4 := MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1
AVX512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=8

test-processors: $(READY)
	$(AVX2) $(BIN)/python -m pytest $(NUMERIC) $(PYTEST_ARGS)
	$(SSE4) $(BIN)/python -m pytest $(NUMERIC) $(PYTEST_ARGS)
	$(AVX512) $(BIN)/python -m pytest $(NUMERIC) $(PYTEST_ARGS)

# What only a GPU can show: the tests marked gpu. FEATX_TEST_DEVICE=cuda:1 takes another, FEATX_TEST_DEVICE=cpu tries
# the tests themselves where there is none.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whether what would be published is complete, and installs on the Pythons to come.
release: $(READY)
	$(BIN)/python constraints/check_release.py

# make bench [BENCH_ARGS="--only extraction --write"]
bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(NOTEBOOK) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
