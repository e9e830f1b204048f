# Which Python: PYTHON=..., else the shell's python3. One inside a virtual or conda environment is used as it is (conda's
# base is not: too much is installed here); any other makes .venv, which is used from then on.
PYTHON ?= python3
ACTIVE := $(shell $(PYTHON) -c 'import os, sys; has = lambda name: os.path.isdir(os.path.join(sys.prefix, name)); \
  own = sys.prefix != sys.base_prefix or (has("conda-meta") and not has("condabin")); near = os.path.relpath(sys.prefix); \
  print("" if not own else sys.prefix if near.startswith("..") else near)' 2>/dev/null)
ENV := $(or $(ACTIVE),.venv)
PY := $(if $(ACTIVE),$(PYTHON),.venv/bin/python)
# One stamp for each environment and checkout: a copied or moved checkout is installed anew.
INSTALLED := $(ENV)/.semidetr-lite-$(shell pwd | cksum | cut -d' ' -f1)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# Threads that wait for work sleep instead of spinning: beside other jobs spinning makes everything many times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install demo test lint check lab notebooks site slides colab checkpoints

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "PYTHON=...   the interpreter that makes .venv, or one inside an environment of yours (now: $(ENV))"
	@echo "OWNER=...    who hosts your fork on GitHub, for links to Colab (else: a remote on github.com, or no links)"
	@echo "REVEAL=...   address, or folder of a copy, of reveal.js 4, which slides load when shown; else a public address"
	@echo "PIP_ARGS=... goes to pip, for instance the index of the CPU-only torch"

install: $(INSTALLED)  ## the package and what it needs, into your active environment or .venv; again if pyproject.toml changed

demo: $(INSTALLED)  ## the main job: train with 10 % of the labels, print the table, write the page
	$(PY) -m semidetr_lite demo

test: $(INSTALLED)  ## unit tests, then every notebook, its outputs compared with the saved ones
	$(PY) -m pytest -n 2 --dist loadfile tests
ifneq ($(NOTEBOOKS),)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --nbval --nbval-current-env notebooks
endif

lint: $(INSTALLED)  ## ruff: faults, docstrings and format; mypy: the types of the package
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --exclude '*.ipynb' .
	$(PY) -m mypy

check: lint  ## ruff, mypy and the unit tests
	$(PY) -m pytest -n 2 --dist loadfile tests

lab: $(INSTALLED)  ## JupyterLab on the notebooks
	$(PY) -m jupyterlab --notebook-dir=notebooks

# Normal form: no times, no widget state, no Python version; cell tags and the kernel's name stay.
notebooks: $(INSTALLED)  ## run every notebook from a clean kernel and save it in normal form
	$(if $(NOTEBOOKS),,$(error there is no notebooks/*.ipynb to run))
	$(PY) -m nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	  --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec $(NOTEBOOKS)

site: $(INSTALLED)  ## the notebooks as pages that need no kernel and no network, in build/site; runs nothing
	$(PY) notebooks/make_pages.py build/site --owner '$(OWNER)'

colab: $(INSTALLED)  ## badges and install cells for Google Colab, OWNER=your name on GitHub; commit them in your fork
	$(PY) notebooks/colab.py '$(OWNER)'

slides: $(INSTALLED)  ## a deck of reveal.js slides for each session of the course, in build/slides
	$(PY) notebooks/make_slides.py build/slides $(if $(REVEAL),--reveal-prefix '$(REVEAL)')

checkpoints: $(INSTALLED)  ## train the notebooks' weights again (seed 0, about an hour)
	$(PY) benchmarks/record_checkpoints.py

.PHONY: pictures results
pictures: $(INSTALLED)  ## the pictures of README.md and docs, in docs/pictures, from recorded runs; trains nothing
	$(PY) docs/make_pictures.py

results: $(INSTALLED)  ## the tables of README.md and docs/*.md, from recorded runs
	$(PY) docs/make_results.py

$(INSTALLED): pyproject.toml $(if $(ACTIVE),,| .venv/bin/pip)
	$(PY) -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not a Python 3.10 or newer; name one: make install PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make a virtual environment: install the system's python3-venv package," \
	    "or activate an environment of your own, and run make again" >&2; exit 2; }
	$(PYTHON) -m venv .venv
