# make demo    train on real digits, sample, judge; prints where the pictures lie
# make test    everything that is fast; make test-slow: launches, real training, wheels
# make proof   what tests hold for a selection, for everything; results in benchmarks/results
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
DEMO_DIR ?= outputs/demo
WORKERS ?= 2
export PYTHONUNBUFFERED = 1

.PHONY: help install demo test test-slow proof lint format dist clean

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(PY) train_acc.py run_dir=$(DEMO_DIR)
	$(PY) sample_acc.py ckpt=$(DEMO_DIR) experiment=digits_demo
	$(PY) -m zigflow.tools demo-report $(DEMO_DIR) --check

test: $(VENV)/.installed lint
	$(PY) -m pytest -n $(WORKERS) -q

test-slow: $(VENV)/.installed
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q -m "slow and not whole_machine"
	$(PY) -m pytest -q -m whole_machine

proof: $(VENV)/.installed
	$(PY) benchmarks/samplers.py --output benchmarks/results/samplers_ddim.json

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff check --preview --select DOC102 .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(PY) --level error
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

dist: $(VENV)/.installed
	$(PY) -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache *.egg-info
