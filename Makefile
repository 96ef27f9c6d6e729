# make demo   trains plain and residual nets on real images and draws the result
# make test   runs the tests (make test TESTS="-m slow" for the slow ones)
#
# Both build .venv from requirements.txt when it is missing or older; with it in place
# neither needs a network.

PYTHON ?= python3
WORKDIR ?= runs/depth_degradation
DEMO ?= --preset=quick
TESTS ?=

.PHONY: demo test clean

demo: .venv/installed
	.venv/bin/python -m experiments.depth_degradation --workdir=$(WORKDIR) $(DEMO)

test: .venv/installed
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { $(PYTHON) --version; echo "cvjax needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
