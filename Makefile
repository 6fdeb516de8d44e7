# make demo and make test set up everything they need in .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser

.PHONY: demo test lint bench clean
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

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make bench [BENCH_ARGS="--only extraction --write"]
bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
