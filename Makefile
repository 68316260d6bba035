# `make chat` and `make test` do everything from a bare clone with python3, make and a C++ compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOOP   ?= 12-14x3
SOURCES := pyproject.toml CMakeLists.txt cmake/upstream.py $(wildcard patches/*) $(wildcard native/*) \
           $(shell find edgeloop -name '*.py' -not -path '*/_vendor/*')

.PHONY: chat test test-slow architectures architectures-check wheel clean

## talk to the demo model; PROMPT="..." answers once and exits; MODEL=file.gguf LOOP=12-20x3 for others
chat: $(VENV)/.installed
	@$(BIN)/edgeloop chat $(MODEL) --loop $(LOOP) $(if $(PROMPT),-st -p "$(PROMPT)")

## all tests but the slow ones
test: $(VENV)/.installed-test
	EDGELOOP_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" $(BIN)/pytest

## the tests that take minutes
test-slow: $(VENV)/.installed-test
	EDGELOOP_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" $(BIN)/pytest -m slow -o addopts="-ra --strict-markers" --timeout 3000

## loop every architecture of upstream's own test and write docs/architectures.md (ten minutes); -check fails when it is stale
architectures architectures-check: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/architectures.py $(if $(findstring check,$@),--check)

## a wheel in dist/
wheel: $(VENV)/.installed
	mkdir -p dist && cp build/wheel/*.whl dist/

clean:
	rm -rf build dist $(VENV)

# build tools, so that cmake, ninja and pip's cache of them are there for the second build as well
$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -m venv $(VENV) || (echo "make: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1)
	$(BIN)/pip install -q --disable-pip-version-check -U "pip>=25.1" "scikit-build-core>=0.11" "pathspec>=0.12" "patch-ng>=1.18,<2" \
		"platformdirs>=4,<5" "cmake>=3.21" ninja
	@touch $@

# the wheel is built once, then installed and tested as a wheel
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "building edgeloop (a few minutes the first time)"
	@rm -rf build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	$(BIN)/pip install -q --disable-pip-version-check build/wheel/*.whl
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check --group test
	@touch $@
