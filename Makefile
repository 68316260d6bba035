# `make chat` and `make test` do everything from a bare clone with python3, make and a C++ compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOOP   ?= 12-14x3
# a fixed version: the range of pyproject.toml would pull the newest build
TORCH  ?= torch==2.13.0
SOURCES := pyproject.toml CMakeLists.txt cmake/upstream.py $(wildcard patches/*) $(wildcard native/*) \
           $(shell find edgeloop -name '*.py' -not -path '*/_vendor/*') $(shell find edgeloop/web -type f)

.PHONY: chat test test-slow test-transformers test-vulkan test-web test-clients test-embedding architectures architectures-check docs docs-check wheel clean

## talk to the demo model; PROMPT="..." answers once and exits; MODEL=file.gguf LOOP=12-20x3 for others
chat: $(VENV)/.installed
	@$(BIN)/edgeloop chat $(MODEL) --loop $(LOOP) $(if $(PROMPT),-st -p "$(PROMPT)")

## all tests but the slow ones
test: $(VENV)/.installed-test
	EDGELOOP_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" $(BIN)/pytest

## the tests that take minutes
test-slow: $(VENV)/.installed-test
	EDGELOOP_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" PATH="$(abspath $(BIN)):$$PATH" \
		$(BIN)/pytest -m slow -o addopts="-ra --strict-markers" --timeout 3000

## the loop against Hugging Face transformers; installs torch first (TORCH=... for another build)
test-transformers: $(VENV)/.installed-test
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check --group transformers
	EDGELOOP_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" $(BIN)/pytest tests/test_transformers.py

## the GPU's tests on a Vulkan build: on the first device there is, which may be Mesa's software one.
## Debian 13: apt install libvulkan-dev glslc spirv-headers mesa-vulkan-drivers
test-vulkan: $(VENV)/.tools
	rm -f build/vulkan/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
		-C cmake.define.GGML_VULKAN=ON -C build-dir=build/vulkan/cmake -w build/vulkan .
	$(PYTHON) -m venv --without-pip build/vulkan/venv
	$(BIN)/pip --python build/vulkan/venv install -q --disable-pip-version-check build/vulkan/*.whl --group test
	GGML_VK_VISIBLE_DEVICES=0 build/vulkan/venv/bin/pytest tests/test_gpu.py

## the page of `edgeloop serve` in a real browser; Debian: apt install chromium
test-web: $(VENV)/.installed-test
	$(BIN)/pip install -q --disable-pip-version-check --group web
	$(BIN)/pytest tests/test_web.py

## openai, LangChain, LlamaIndex, llm and a schema checker against `edgeloop serve`
test-clients: $(VENV)/.installed-test
	$(BIN)/pip install -q --disable-pip-version-check --group clients
	$(BIN)/pytest tests/test_server_clients.py

## the examples, one of them frozen by PyInstaller (two minutes); Debian: apt install xvfb for the desktop window
test-embedding: $(VENV)/.installed-test
	$(BIN)/pip install -q --disable-pip-version-check --group embedding
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest tests/test_embedding.py tests/test_examples.py

## loop every architecture of upstream's own test and write docs/architectures.md (ten minutes); -check fails when it is stale
architectures architectures-check: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/architectures.py $(if $(findstring check,$@),--check)

## the documentation in build/docs; -check fails when a generated part of it is stale
docs docs-check: $(VENV)/.installed
	cd / && $(abspath $(BIN))/python $(CURDIR)/scripts/docs.py $(if $(findstring check,$@),--check)
	$(BIN)/pip install -q --disable-pip-version-check --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -d build/docs

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
	$(BIN)/pip install -q --disable-pip-version-check --group test "$$(ls build/wheel/*.whl)[server]"
	@touch $@
