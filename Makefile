# Two commands: `make demo` trains a small language model on this machine's own Python library,
# `make test` runs the whole suite. Both make .venv first; they need Python 3.11–3.13 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak check format clean

demo: $(VENV)/installed
	$(BIN)/python -m tst_ray.run

test: $(VENV)/installed
	$(BIN)/python -m pytest

# The long form of what `test` does briefly: twenty faults at random in one run, and nothing lost.
soak: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_recovery.py -k soak --soak=20 -s

# What a change must pass before its tests run.
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
