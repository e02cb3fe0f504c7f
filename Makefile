# The whole project: `make report` trains, scores and writes; `make test` checks. Both set up what is missing first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: report test faults lab bench setup ffmpeg chromium apt clean

report: setup
	$(VENV)/bin/python -m mss_utils run $(if $(PROFILE),--profile $(PROFILE)) $(if $(RUN),--run $(RUN)) \
		$(if $(DATA),--data "$(DATA)") $(if $(TARGET),--target "$(TARGET)") $(if $(SET),--set $(foreach setting,$(SET),'$(setting)'))

test: setup chromium
	$(VENV)/bin/python -m pytest

# The long form of tests/faults: fifty kills, two thousand cases, an hour in stereo, a clean environment.
faults: setup
	$(VENV)/bin/python -m pytest --long tests/faults

lab: setup
	$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

bench: setup
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(VENV)/bin/python benchmarks/throughput.py

setup: $(READY) ffmpeg

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s" % (sys.executable, sys.version.split()[0]))'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory apt PACKAGE=python3-venv
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

ffmpeg:
	@command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || $(MAKE) --no-print-directory apt PACKAGE=ffmpeg

# The tests open the listening page in a browser; without one they are skipped.
chromium:
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory apt PACKAGE=chromium

# Install PACKAGE with apt where that needs no password; otherwise say what to run.
apt:
	@if [ "$$(id -u)" = 0 ]; then root=; else root="sudo -n"; fi; \
	$$root apt-get update -qq 2>/dev/null && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends $(PACKAGE) >/dev/null 2>&1 \
		|| { echo "$(PACKAGE) is missing and could not be installed; run: sudo apt-get install $(PACKAGE)" >&2; [ $(PACKAGE) != python3-venv ]; }

clean:
	rm -rf $(VENV) .cache/songs-* .cache/stores results/smoke
