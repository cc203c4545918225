# Every target sets up what it needs: a virtual environment in .venv with the exact set of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= pipelines/configs/sandbox.yaml

.PHONY: demo test test-system lint checks format submit

demo: $(VENV)/installed  ## the complete pipeline on the embedded sandbox
	$(BIN)/python -m pipelines.run --config $(CONFIG)

submit: $(VENV)/installed  ## COMMAND as a job on the cluster at RAY_API_SERVER_ADDRESS: see docs/cluster.md
	$(BIN)/python -m pipelines.preflight --upload .
	$(BIN)/ray job submit $(SUBMIT) --working-dir . -- $(COMMAND)

test: $(VENV)/installed  ## all tests but those of the complete system; three files at a time, those of a room that need Ray on one cluster
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not system" --ignore=tests/system $(PYTEST)

test-system: $(VENV)/installed  ## complete pipelines, real kills, S3, jobs and sweeps
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m system

lint: $(VENV)/installed  ## formatting, ruff, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

checks: lint test test-system  ## what a change must pass

format: $(VENV)/installed  ## put the source into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@
