# Two commands for everything: `make figures` and `make test`. Each sets up what it needs, once.
# GPU: make figures TORCH_BACKEND=auto

VENV ?= .venv
PAPER ?=
TORCH_BACKEND ?= cpu
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
READY := $(VENV)/.ready

.PHONY: figures test lab bench refresh clean help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# setuptools and pip never see torch's own index, so a CPU build is asked for first, by uv, which knows where
# it is. Where that cannot be reached, pip takes whatever torch its settings lead to.
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "heads needs Python 3.11 or newer: install it, or say PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Setting up $(VENV), once'
	@$(BIN)/python -m pip install --quiet uv
	@torch=$$($(BIN)/python -c "import tomllib; print(next(d for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if d.startswith('torch==')))"); \
	$(BIN)/python -c "from importlib.metadata import version; import sys; sys.exit(version('torch').split('+')[0] != '$$torch'.split('==')[1])" 2>/dev/null || \
	UV_HTTP_RETRIES=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend $(TORCH_BACKEND) $$torch 2>/dev/null || \
	$(BIN)/python -m pip install --quiet $$torch
	@$(BIN)/python -m pip install --quiet --editable '.[test,lab]'
	@$(BIN)/python -m ipykernel install --sys-prefix --name heads --display-name heads >/dev/null
	@touch $@

figures: $(READY)  ## run every ready notebook, or PAPER=slug, and renew figures/
	@$(BIN)/heads fetch >/dev/null
	$(BIN)/heads run $(or $(PAPER),--all)

test: $(READY)  ## all tests, then every notebook through nbval
	@$(BIN)/heads fetch >/dev/null
	HEADS_FIGURES=$$(mktemp -d) $(BIN)/python -m pytest
	HEADS_FIGURES=$$(mktemp -d) $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
		-p no:cacheprovider -q notebooks

lab: $(READY)  ## JupyterLab on the notebooks, with a kernel named heads
	@$(BIN)/heads fetch >/dev/null
	$(BIN)/jupyter lab notebooks

bench: $(READY)  ## time and memory against named peers
	@$(BIN)/heads fetch >/dev/null
	$(BIN)/python -m tests.benchmarks

refresh: $(READY)  ## execute the committed notebooks again, in place
	$(BIN)/heads run $(or $(PAPER),--all) --refresh

clean:  ## remove the environment and run folders
	rm -rf $(VENV) runs *.egg-info
