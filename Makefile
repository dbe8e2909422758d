# make demo   trains and evaluates a small CLIP on the embedded data set; report in runs/demo/report/index.html
# make test   runs the test suite
# make parity  compares models in Transformers with the same models here, live (installs torch)
# make fuzz   damages every kind of input that the package reads, 5,000 times each: hours; MUTATIONS=200 KINDS="tar lock"
# make docs   runs every command and snippet of README.md and docs/
# make notebooks  executes colab/ and changes no file; STORE=--store writes the outputs into the files
# make site   builds README.md, docs/, experiments/ and the API as a site with search, site/index.html
# make lint   ruff check and ruff format
PYTHON ?= python3
VENV ?= .venv
LOCK ?= requirements.lock
CONFIG ?= configs/clip.py:tiny
WORKDIR ?= runs/demo
TESTS ?= tests
MUTATIONS ?= 5000
KINDS ?=
STORE ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test parity fuzz docs notebooks site lint format lock clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m vlm_jax.train --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

parity: $(VENV)/installed-parity
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n 2 --dist worksteal -rs tests/parity

fuzz: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python -W ignore -m tests.support.fuzz --mutations=$(MUTATIONS) $(KINDS)

docs: $(VENV)/installed-docs
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n 2 --dist worksteal -rs tests/docs

notebooks: $(VENV)/installed-docs
ifeq ($(STORE),)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n 0 tests/notebooks
else
	$(VENV)/bin/python colab/execute.py $(STORE)
endif

site: $(VENV)/installed-site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/installed: pyproject.toml $(LOCK)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(LOCK) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --constraint $(LOCK) --editable '.[test]'
	touch $@

$(VENV)/installed-parity: $(VENV)/installed-test
	$(PIP) --constraint $(LOCK) --editable '.[test,parity]'
	$(PIP) --no-deps open_clip_torch==3.3.0 timm==1.0.31 torchvision ftfy wcwidth # tests/support/torchvision_import.py
	touch $@

$(VENV)/installed-docs: $(VENV)/installed-test
	$(PIP) --constraint $(LOCK) --editable '.[test,hf,lit,tpu,colab]'
	touch $@

$(VENV)/installed-site: $(VENV)/installed-test
	$(PIP) --constraint $(LOCK) --editable '.[test,site]'
	touch $@

# Writes the versions that demo and test install. `make test LOCK=/dev/null VENV=.venv-newest` installs the newest.
lock: $(VENV)/installed-parity $(VENV)/installed-site
	$(VENV)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) build site *.egg-info
