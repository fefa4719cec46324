# `make demo` and `make test` set everything up first: a virtual environment in .venv with pinned PyTorch and hearsae itself.
PYTHON ?= python3
# Any torch that pip can find will do; this release is the one that is tested.
TORCH ?= torch==2.13.0
READY := .venv/.ready
# The libraries whose formats hearsae exports and imports, in an environment of their own: `make peers`, then HEARSAE_PEERS=.venv-peers/bin/python.
PEERS ?= sae-lens==6.54.12 eai-sparsify==1.3.3
# dictionary-learning asks for far more than its dictionaries need; zstandard is what they do.
PEERS_ALONE ?= dictionary-learning==0.1.0 zstandard==0.25.0
PEERS_READY := .venv-peers/.ready
# Without the slow ones under ten minutes on two cores; PYTEST_ARGS='-m "not gpu"' runs those too, as .ci/run does.
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

peers: $(PEERS_READY)

$(PEERS_READY): Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet "$(TORCH)"
	.venv-peers/bin/pip install --quiet "$(TORCH)" $(PEERS)
	.venv-peers/bin/pip install --quiet --no-deps $(PEERS_ALONE)
	touch $(PEERS_READY)

clean:
	rm -rf .venv .venv-peers build *.egg-info

.PHONY: demo test lint peers clean
