# Everything is done through these targets; `make` alone lists them. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
CHAPTER ?= all
PORT ?= 8000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt
HTML := _build/html
MATHJAX := $(HTML)/_static/mathjax
UNIT := $(BIN)/python -m pytest -m "not site" -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help book serve test check lint unit kernels notebooks site execute model linkcheck clean

help:
	@echo "make book              render the committed notebooks to $(HTML) (no torch needed)"
	@echo "make serve             make book, then show it on http://127.0.0.1:$(PORT)"
	@echo "make execute           run the notebooks again, in place; CHAPTER=04-gptq for one of them"
	@echo "make check             the book's conventions, in seconds"
	@echo "make lint              ruff"
	@echo "make test              everything CI runs: lint, check, unit tests, kernels, notebooks, site, browser tests"
	@echo "make unit|kernels|notebooks|site   parts of make test"
	@echo "make clean             remove what make made, $(VENV) included"

# --- environments: one folder, two levels; a stamp tells what is in it ------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "lqedu needs Python 3.11 to 3.13: make PYTHON=python3.12"'
	@echo "==> creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The list of the `book` extra without the package itself, whose dependencies (torch) rendering does not need.
$(VENV)/stamp-book: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing what renders the book"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["book"], sep="\n")' > $(VENV)/book.txt
	$(PIP) -r $(VENV)/book.txt
	@touch $@

$(VENV)/stamp-all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing lqedu and everything that tests it (a few minutes the first time)"
	$(PIP) --no-compile -e '.[notebook,book,dev,gpu]'
	@# pip compiles to byte code on one core. Files for other Pythons do not compile, and nobody imports them.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@ $(VENV)/stamp-book

# --- the book ---------------------------------------------------------------------------------------------------------

book: $(VENV)/stamp-book
	@echo "==> rendering the book"
	$(BIN)/jupyter-book build .
	@$(MAKE) --no-print-directory trim
	@echo "==> open file://$(CURDIR)/$(HTML)/index.html"

# Of MathJax, 24 MB, the pages need the CHTML output, its fonts and the TeX input.
.PHONY: trim
trim:
	@find $(MATHJAX) -mindepth 1 -maxdepth 1 ! -name tex-chtml.js ! -name output ! -name input -exec rm -rf {} +
	@rm -rf $(MATHJAX)/output/svg* $(MATHJAX)/input/asciimath* $(MATHJAX)/input/mml*

serve: book
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

execute: $(VENV)/stamp-all
	$(BIN)/python tests/notebooks/execute.py $(CHAPTER)

# --- checks -----------------------------------------------------------------------------------------------------------

check: $(VENV)/stamp-book
	$(BIN)/python tests/site/check.py

lint: $(VENV)/stamp-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: $(VENV)/stamp-all
	OMP_NUM_THREADS=1 $(UNIT)

# Triton decides at import whether it interprets, so the kernels have processes of their own: one runs them on the CPU, one
# compiles them for GPUs that are not there, one does so for the Gluon kernels, which need Triton 3.6, and a plain twin.
kernels: $(VENV)/stamp-all $(VENV)/triton36/stamp
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels kernels/lqedu_kernels -n 2 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels_compiled -n 2
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton36 $(BIN)/python -m pytest -n 2 \
	  tests/kernels_compiled/test_hopper_dense.py tests/kernels_compiled/test_hopper_few.py tests/kernels_compiled/test_hopper_w4.py tests/kernels_compiled/test_w8a8.py

$(VENV)/triton36/stamp: $(VENV)/stamp-all
	@echo "==> Triton 3.6, the compiler of the Gluon kernels, beside the newer one"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(VENV)/triton36 'triton==3.6.0'
	@touch $@

# The model is fetched and converted once, here, so that no notebook cell waits for it.
model: $(VENV)/stamp-all
	@echo "==> the embedded model (fetched once, then cached)"
	$(BIN)/python -c 'import lqedu; lqedu.load_model("smollm2-135m")'

# Two chapters at once, one thread each: threads that outnumber the cores wait for each other, several times over.
notebooks: $(VENV)/stamp-all model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c tests/notebooks/pytest.ini --rootdir . book/chapters

# A build over old doctrees forgets their warnings, so they go first.
site: $(VENV)/stamp-all
	rm -rf _build/.doctrees $(HTML)
	$(BIN)/jupyter-book build . -n -W --keep-going
	@$(MAKE) --no-print-directory trim
	$(BIN)/python -m pytest tests/site -m site -n 2 -v

# One after the other, whatever -j says; the last line is pytest's.
test: $(VENV)/stamp-all
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory check
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory kernels
	$(MAKE) --no-print-directory notebooks
	$(MAKE) --no-print-directory site

# Needs a network; the weekly workflow runs it.
linkcheck: $(VENV)/stamp-book
	$(BIN)/jupyter-book build . --builder linkcheck -q

clean:
	rm -rf $(VENV) _build build dist lqedu.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
