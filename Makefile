# Every target makes its own environment: a machine needs only Python >= 3.11 with pip and venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/
UV := $(VENV)-uv/bin/uv
STAMP := $(VENV)/.synced
# An interpreter that is already here is used; nothing but packages is downloaded.
export UV_PYTHON_DOWNLOADS := never
export UV_COMPILE_BYTECODE := 1
export UV_PROJECT_ENVIRONMENT := $(VENV)

.PHONY: setup demo digits test test-slow soak lint bench clean

setup: $(STAMP)

$(UV):
	$(PYTHON) -m venv $(VENV)-uv
	$(VENV)-uv/bin/python -m pip install --quiet uv

$(STAMP): pyproject.toml uv.lock setup.py | $(UV)
	$(UV) sync --frozen --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
	@touch $(STAMP)

demo: $(STAMP)
	$(RUN)unitok demo

digits: $(STAMP)
	$(RUN)python scripts/run_digits.py

test: $(STAMP)
	$(RUN)python -m pytest -m "not slow"

# One process a file: rank tests fork, and what one file leaves behind is no business of the next.
test-slow: $(STAMP)
	set -e; for file in $$(grep -l "mark.slow" tests/test_*.py); do $(RUN)python -m pytest -m slow $$file; done

# Kills at random moments over both stages and extraction, about 5 to 10 minutes on 2 cores: docs/faults.md.
soak: $(STAMP)
	$(RUN)python scripts/soak.py

lint: $(STAMP)
	$(RUN)ruff check .
	$(RUN)ruff format --check .

bench: $(STAMP)
	$(RUN)python scripts/benchmark.py
	$(RUN)python scripts/benchmark_quantizer.py

clean:
	rm -rf $(VENV) $(VENV)-uv build *.egg-info
