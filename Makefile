# Every verb makes .venv and installs what it needs on first use. PYTHON may name another interpreter (3.10 or later).
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo figures test test-gpu test-clients lint bench clean

demo: .venv/runtime  ## both students of the embedded teacher, about 5 minutes on two CPU cores; out/demo
	$(RUN) demo/demo.py

figures: .venv/runtime  ## the figures in demo/figures, from the last `make demo`
	$(RUN) demo/figures.py

test: .venv/dev  ## everything that needs no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m "not gpu"

test-gpu: .venv/dev  ## the kernel against its reference on the GPU at hand
	$(RUN) -m pytest -m gpu

test-clients: .venv/clients/done  ## exports in llama.cpp, which is built from source once: some ten minutes
	$(RUN) -m pytest tests/test_clients.py

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: .venv/runtime  ## speed and memory of the loss, side by side with what one would use instead
	$(RUN) -m bench kernel
	$(RUN) -m bench memory

clean:
	rm -rf .venv out .pytest_cache .ruff_cache

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt tests/requirements-v4.txt tests/requirements-vocabularies.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/transformers4 -r tests/requirements-v4.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/vocabularies -r tests/requirements-vocabularies.txt
	touch $@

.venv/clients/done: .venv/dev tests/requirements-clients.txt
	rm -rf .venv/clients
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python -r tests/requirements-clients.txt --dest .venv/clients
	mkdir .venv/clients/llama.cpp
	tar xzf .venv/clients/llama_cpp_python-*.tar.gz --strip-components 1 -C .venv/clients/llama.cpp
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/clients/site .venv/clients/llama.cpp .venv/clients/diskcache-*
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/clients/others .venv/clients/mlx*.whl .venv/clients/exllamav2-*.whl
	touch $@
