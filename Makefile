# make report: everything from data to report. Each target installs what is missing first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN_FLAGS = $(if $(PROFILE),--profile $(PROFILE)) $(if $(RUN),--run $(RUN)) $(if $(DATA),--data "$(DATA)") \
	$(if $(TARGET),--target "$(TARGET)") $(if $(SET),--set $(foreach setting,$(SET),'$(setting)'))

.DEFAULT_GOAL := help
.PHONY: help report test test-all lint lab bench setup ffmpeg chromium apt clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo 'make report takes PROFILE= RUN= DATA= TARGET= SET="key=value ...": see docs/command_line.md'

report: setup  ## train, score, listen, write results/<run>/report.pdf
	$(VENV)/bin/python -m mss_utils run $(RUN_FLAGS)

test: setup chromium  ## unit and integration tests, and a short browser check
	$(VENV)/bin/python -m pytest tests/integration tests/unit tests/slow/test_browser_quick.py

test-all: setup chromium  ## all tests: also kills, full disks, fuzzing, browser, an hour-long song
	$(VENV)/bin/python -m pytest

lint: setup  ## formatter, linter, type checker
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright

lab: setup  ## open the notebooks
	$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

bench: setup  ## speed and memory of loading and training
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(VENV)/bin/python benchmarks/throughput.py

setup: $(READY) ffmpeg  ## install packages (.venv) and ffmpeg

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s" % (sys.executable, sys.version.split()[0]))'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory apt PACKAGE=python3-venv
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

ffmpeg:
	@command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || $(MAKE) --no-print-directory apt PACKAGE=ffmpeg

chromium:
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory apt PACKAGE=chromium

# Install PACKAGE with apt if that needs no password; otherwise print the command.
apt:
	@if [ "$$(id -u)" = 0 ]; then root=; else root="sudo -n"; fi; \
	$$root apt-get update -qq 2>/dev/null && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends $(PACKAGE) >/dev/null 2>&1 \
		|| { echo "$(PACKAGE) is missing and could not be installed; run: sudo apt-get install $(PACKAGE)" >&2; [ $(PACKAGE) != python3-venv ]; }

clean:  ## remove environment, built-in songs, stem stores, smoke run, leftover parts of files
	rm -rf $(VENV) .cache/songs-* .cache/stores results/smoke
	find .cache results -name '.part-*' -exec rm -rf {} + 2>/dev/null || true
