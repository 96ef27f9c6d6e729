# make demo   trains plain and residual nets on real images and draws the result, in a
#             process for each of up to four cores
# make test   runs the tests (make test TESTS="-m slow" for the slow ones)
#
# Both build .venv from requirements.txt when it is missing or older, and oneDNN's kernels
# for the CPU where there is a C++ compiler (cvjax/nn/onednn); with it in place neither needs
# a network. PYTHON=python3.13 builds it with that Python (make clean first, or
# VENV=.venv313 for one beside it).

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/depth_degradation
DEMO ?= --preset=quick --processes=0
TESTS ?=

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m experiments.depth_degradation --workdir=$(WORKDIR) $(DEMO)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { $(PYTHON) --version; echo "cvjax needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	$(VENV)/bin/python -m cvjax.nn.onednn
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
