# Needs Python 3.11 or newer, make and a package index; everything else goes into .venv.
# Another interpreter for a new .venv: make test PYTHON=/path/to/python3.12

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2
ARGS ?=
FAST := not slow and not cuda and not faults and not commands and not processes and not browser and not parity
LOWEST := .venv-lowest
# What touches the libraries most: saved files, tokenizers, networks, environments, SB3, metrics, and the preset `smoke`
# through stage 3 with its checkpoints (test_train_ral.py).
LOWEST_TESTS := $(addprefix tests/test_,vqvae.py vqgan.py storage.py envs.py old_files.py policy.py metrics.py sampler.py train_ral.py)

# One stamp per folder and per content of the two files that decide what is installed, so that a
# moved or copied .venv, or a changed version, is noticed whatever the files' dates say.
STAMP := $(VENV)/.installed-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | tr ' ' '-')
PIP := $(PY) -m pip --quiet --quiet --no-input --disable-pip-version-check
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help venv demo results assets docs test test-commands test-processes test-browser test-parity test-slow test-cuda gpu-check test-faults soak test-lowest check format package bench clean distclean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## Build .venv and install the package with its development tools (a few minutes, once)

demo: $(STAMP) ## Face photos -> VQ-VAE -> PixelCNN -> RAL, table and pictures; options: ARGS="--preset ..."
	$(PY) examples/train_celeba.py $(ARGS)

results: $(STAMP) ## All of docs/results.md again, about 75 minutes on 2 cores; options: ARGS="--parts oracle"
	$(PY) examples/make_results.py $(ARGS)

assets: $(STAMP) ## Make the models that come with the package again, from a run of the preset demo-patchgan
	$(PY) examples/make_assets.py $(ARGS)

docs: $(STAMP) ## The site, in docs/_build/html; needs no network, warnings are errors
	$(PY) -m sphinx --fresh-env --fail-on-warning --quiet -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

test: $(STAMP) ## The fast tests; options: JOBS=4 ARGS="-k sampler"
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m "$(FAST)" -n $(JOBS) $(ARGS)

test-commands: $(STAMP) ## Whole runs through the command line, with every setting changed and with parts of your own
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m commands -n $(JOBS) --dist loadfile $(ARGS)

test-processes: $(STAMP) ## Training on several processes
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m processes $(ARGS)

test-browser: $(STAMP) ## The report, the site and the page of `ral-gym play` in a browser (Chromium)
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m browser $(ARGS)

test-parity: $(STAMP) ## Networks of released checkpoints against independent implementations (transformers, diffusers)
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m parity $(ARGS)

test-slow: $(STAMP) ## The tests that train for minutes
	$(PY) -P -m pytest -m "slow and not cuda and not faults" $(ARGS)

test-cuda: $(STAMP) ## The tests that need a CUDA device
	RAL_GYM_TEST_CUDA=1 $(PY) -P -m pytest -m cuda $(ARGS)

gpu-check: $(STAMP) ## On a CUDA device, 7 minutes at most: tests, drawing, training, memory; table in gpu_check/
	$(PY) benchmarks/gpu_check.py $(ARGS)

test-faults: $(STAMP) ## Kills, full disks, damaged files, a 3-minute soak (20 minutes at most)
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -m faults -n $(JOBS) --dist loadfile $(ARGS)

soak: $(STAMP) ## 30 minutes of environment, stage 3 and sample; memory must stay flat
	RAL_GYM_SOAK_SECONDS=1800 OMP_NUM_THREADS=1 $(PY) -P -m pytest -m faults -s tests/test_soak.py $(ARGS)

# torch is the version of constraints.txt, see constraints-lowest.txt. Old releases warn of Python's and of each other's
# new ones, so that warnings are no errors here. Models saved under numpy 2 (saved_model) do not load under numpy 1, as README says.
test-lowest: $(STAMP) ## A part of the fast tests with the lowest versions allowed, in .venv-lowest
	$(PY) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip --quiet --no-input --disable-pip-version-check install -c constraints-lowest.txt \
	    "$$(grep '^torch==' constraints.txt)" -e '.[demo,lsun,hf]' pytest pytest-xdist hypothesis pygame
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -P -m pytest -W default -m "$(FAST)" -k "not saved_model" \
	    -n $(JOBS) $(LOWEST_TESTS) $(ARGS)

check: $(STAMP) ## Lint, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@# The folders envs/ and agents/ are parts of ral_gym only once installed. mypy would pass over
	@# them in silence, so it gets a tree in which links put them in their place.
	@rm -rf .check && mkdir -p .check/ral_gym
	@cd .check/ral_gym && ln -s ../../ral_gym/* ../../envs ../../agents .
	cd .check && ../$(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p ral_gym
	cd .check && ../$(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache ../examples ../benchmarks

format: $(STAMP) ## Apply the formatter and the linter's safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

package: $(STAMP) ## Source archive and wheel in dist/, checked
	rm -rf dist build
	$(PY) -m build --no-isolation --outdir dist .
	$(PY) -m twine check --strict dist/*

bench: $(STAMP) ## Run every benchmark
	@for script in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script $(ARGS) || exit 1; done

clean: ## Remove caches and build products (keeps .venv and runs/)
	rm -rf build dist docs/_build *.egg-info .check .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ral_gym envs agents examples benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and .venv-lowest too
	rm -rf $(VENV) $(LOWEST)

$(STAMP):
	@if ! $(PY) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	    command -v $(PYTHON) >/dev/null || \
	        { echo "make: no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	    $(PYTHON) -c '$(NEW_ENOUGH)' || \
	        { echo "make: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); 3.11 or newer is needed, name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	        { echo "make: '$(PYTHON)' cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 1; }; \
	    echo "Making $(VENV) with $$($(PYTHON) -V)"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing into $(VENV): once, one to three minutes"
	@rm -f $(VENV)/.installed-*
	@$(PIP) install -c constraints.txt pip setuptools
	@$(PIP) install -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
	@touch $@
