# The jobs of this repository; `make` alone lists them. Each creates what it needs in .venv
# from nothing but Python; what is done already is not done again. Pins: pyproject.toml.

VENV ?= .venv
# Which build of torch: cpu, auto (finds the GPU), cu130, ... The choice is remembered.
TORCH_BACKEND ?= $(shell cat $(VENV)/.torch-backend 2>/dev/null || echo cpu)
NOTEBOOKS :=

PY    := $(VENV)/bin/python
HEADS := $(PY) -m heads
READY := $(VENV)/.ready-$(TORCH_BACKEND)
MODEL := $(VENV)/.model

.DEFAULT_GOAL := help
.PHONY: help figures test test-all lab bench refresh setup clean clean-env

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="	" read -r name what; do \
		printf '  make %-10s %s\n' "$$name" "$$what"; done

figures: $(MODEL)  ## regenerate the figures of all ready papers, or of one: PAPER=retrieval-head
	$(HEADS) run $(or $(PAPER),--all) $(ARGS)

# The notebooks run even if a test fails (1), not after a Ctrl-C (2). Tests draw into a folder of their own, so that
# the committed figures stay as they are, and nothing that `heads.kept` holds is trusted.
test: $(MODEL)  ## the tests, then the notebooks: the defaults of what changed and of one in each part, the others drilled
	@HEADS_FIGURES=$$(mktemp -d); trap 'rm -rf "$$HEADS_FIGURES"' EXIT; \
	export HEADS_FIGURES HEADS_CACHE=0 OMP_NUM_THREADS=1; \
	status=0; $(PY) -m pytest tests -n 2 --dist loadfile || status=$$?; test $$status -le 1 || exit $$status; \
	$(PY) -m tests.notebooks $(NOTEBOOKS) || status=1; exit $$status

test-all: NOTEBOOKS := --all
test-all: test  ## the same, with the defaults of every notebook

lab: $(MODEL)  ## open JupyterLab on the notebooks, with the kernel "heads"
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(ARGS)

bench: $(MODEL)  ## time and memory against named peers, or one: NAME=detect; NAME=families tries all of transformers
	@test "$(NAME)" = families || $(PY) -m tests.benchmarks $(NAME)
	@test -n "$(filter-out families,$(NAME))" || $(PY) -m tests.families

refresh: $(MODEL)  ## execute the committed notebooks again (PAPER=slug for one)
	$(HEADS) run $(or $(PAPER),--all) --refresh $(ARGS)

setup: $(MODEL)  ## only create the environment and fetch the default models

clean:  ## remove runs and caches (not the environment, figures or models)
	rm -rf runs build dist heads.egg-info .pytest_cache .hypothesis
	find heads tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} + 2>/dev/null || true

clean-env:  ## remove the environment
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "$(VENV) is not an environment" >&2; exit 1; }
	rm -rf $(VENV)

# --- how the environment comes to be ---------------------------------------------------

# The first interpreter that the pins can use and that can make an environment (some
# systems package Python without ensurepip). PYTHON=... names one.
define find_python
for py in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	"$$py" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
		2>/dev/null && break; py=; \
done; \
test -n "$$py" || { echo "heads needs Python 3.11 to 3.14 with venv and pip; none found. \
Install one, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
endef

torch_pin = $(PY) -c 'import tomllib; print(*[d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch==")])'
PIP := $(PY) -m pip --disable-pip-version-check
UV  := $(PY) -m uv pip install --python $(PY)

# uv because it knows PyTorch's own indexes, where the builds without CUDA are; pip where
# uv or that index is out of reach (one retry only: the way round it is good).
$(READY): pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(find_python); echo "$$py -m venv $(VENV)"; "$$py" -m venv $(VENV); }
	@old=$$(cat $(VENV)/.torch-backend 2>/dev/null || true); \
	test "$${old:-$(TORCH_BACKEND)}" = $(TORCH_BACKEND) || $(PIP) uninstall --quiet --yes torch
	@$(PIP) install --quiet uv || echo "no uv here, going on with pip"
	@pin=$$($(torch_pin)); echo "$$pin, build: $(TORCH_BACKEND)"; \
	UV_HTTP_RETRIES=1 $(UV) --torch-backend $(TORCH_BACKEND) "$$pin" || \
		{ echo "PyTorch's own index did not serve it: taking pip's build of torch"; $(PIP) install "$$pin"; }
	@$(UV) -e '.[test,lab]' || $(PIP) install -e '.[test,lab]'
	@$(PY) -m ipykernel install --sys-prefix --name heads --display-name heads
	@rm -f $(VENV)/.ready-*; echo $(TORCH_BACKEND) > $(VENV)/.torch-backend; touch $@

$(MODEL): $(READY)
	$(HEADS) fetch
	$(HEADS) fetch minilm
	@touch $@
