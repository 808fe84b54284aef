# Two commands: `make train` and `make test`. Everything else is help for those who work on the notebooks.
SHELL := bash
PYTHON ?= python3
PY := .venv/bin/python
BIN := .venv/bin
RUN ?= default
CI_ENV := OMP_NUM_THREADS=1 MPLBACKEND=agg
N ?= 2

.PHONY: train train-full test package site lab docs hooks clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/installed: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# The name of a run may hold spaces and quotes: the shell gets it from the environment, papermill as text (-r).
export RUN
train: .venv/installed  ## the whole method at small size, about 20 minutes on 2 cores
	@case "/$$RUN/" in \
	    *//* | */./* | */../* | *[\\{}[:cntrl:]]* | */' '* | *' '/*) \
	        printf '%s\n' "RUN='$$RUN' can be no folder below runs/: no '.', '..', braces, backslash, nor a space at an end" >&2; exit 2;; esac
	@mkdir -p "runs/$$RUN"
	$(BIN)/papermill --log-output --no-progress-bar nbs/train.ipynb "runs/$$RUN/train.ipynb" $(CONFIG) -r name "$$RUN" $(ARGS)
	@printf '%s\n' "Done. The executed notebook: runs/$$RUN/train.ipynb; the figures: runs/$$RUN/results.json; the networks: runs/$$RUN/*.safetensors"

train-full: RUN = full
train-full: CONFIG = -f nbs/configs/full.yaml
train-full: train  ## the same at a larger size, about two hours on 2 cores or minutes on a GPU

test: .venv/installed  ## everything that CI runs
	@bash tests/run.sh

package: .venv/installed  ## wheel and source distribution, built, checked, and used in an empty environment
	$(PY) tests/installed.py

site: .venv/installed  ## pages of all notebooks with what they show, in _site/html; N=4 runs four at a time
	@$(CI_ENV) PYTHONHASHSEED=0 HF_HUB_OFFLINE=1 $(PY) tests/make_site.py -n $(N)

lab: .venv/installed  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

docs: .venv/installed  ## pages of the API in _docs, where quarto is installed (quarto.org)
	@command -v quarto >/dev/null || { echo "quarto is not installed: get it from quarto.org, or read the notebooks, which say the same"; exit 1; }
	$(BIN)/nbdev_docs

hooks: .venv/installed  ## git hooks that clean notebooks and merge them
	$(BIN)/nbdev_install_hooks

clean:  ## remove what was made; data and runs stay
	rm -rf .venv build _site *.egg-info .pytest_cache
