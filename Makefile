# `make demo` and `make test` set everything up first: a virtual environment in .venv with pinned PyTorch and hearsae itself.
PYTHON ?= python3
# Any torch that pip can find will do; this release is the one that is tested.
TORCH ?= torch==2.13.0
READY := .venv/.ready
# Without the slow ones a few minutes; PYTEST_ARGS='-m "not gpu"' runs those too, as .ci/run does.
PYTEST_ARGS ?= -m "not slow"

demo: $(READY)
	.venv/bin/hearsae demo

test: $(READY)
	.venv/bin/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "$(TORCH)"
	.venv/bin/pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info

.PHONY: demo test lint clean
