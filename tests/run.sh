#!/usr/bin/env bash
# What `make test` runs, in order; stops at the first failure. Needs .venv (made by the Makefile).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg OMP_NUM_THREADS=1 PYTHONHASHSEED=0
export HF_HUB_OFFLINE=1  # no test asks the Hub: where there is no network each question takes minutes to fail

# Graphviz draws the graphs, Chromium tests the explorer. Root on a Debian machine gets them; for others
# those tests are skipped with a reason.
get() {
    command -v "$1" >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null && return
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${@:2}") >/dev/null 2>&1 || echo "${*:2} could not be installed: its tests will be skipped"
}
get dot graphviz
get chromedriver chromium chromium-driver

# What notebooks and tests leave lies in one folder, which goes with this script: 2 GB of notebooks, then at most 6 GB of tests.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

step() { echo; echo "== $* ($(date +%H:%M:%S))"; }

step "notebooks and modules agree; notebooks are clean; README.md is current"
python tests/check_reproducible.py

step "ruff: columns, imports, and what often goes wrong; import-linter: the floors of the house"
ruff check nbs tests setup.py
lint-imports tests/architecture.ini

step "nbdev_test: every notebook runs from top to bottom"
nbdev_test --n_workers 2
rm -rf "${TMPDIR:?}"/*

step "pytest, one file at a time in each of two processes, the longest first"
long=(survival export train benchmark configs study stages devices steps processes estimation command package browser)
files=$( (printf 'tests/test_%s.py\n' "${long[@]}"; ls tests/test_*.py) | awk '!seen[$0]++')
python -m pytest $files -q -rs -n 2 --dist loadfile --no-loadscope-reorder --durations=8
