# Two commands do all the set-up: `make demo` runs the main job on real images, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-short test-slow lint site format clean

demo: $(VENV)/demo-installed
	$(BIN)/raydistill run jobs/demo.yaml

# Two processes, each with a Ray of its own: a file's tests stay in one of them, with what they share.
test: $(VENV)/dev-installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-short: $(VENV)/dev-installed
	$(BIN)/python -m pytest tests/chaos tests/data/test_fuzz.py -m short --timeout=900

test-slow: $(VENV)/dev-installed
	$(BIN)/python -m pytest -m slow --timeout=1800

lint: $(VENV)/dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry raydistill
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir $(abspath $(VENV))/site

site: $(VENV)/dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(abspath $(VENV))/site

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/%-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) workspace *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
