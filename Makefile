# make demo      corpus, tokenizer, pretraining, export and generation, in one go (minutes; CPU or GPU)
# make test      the tests; with TE=optional those of tests/te are skipped, instead of failing, where its packages are not
# make lint      format, lint and types
# make gpu-check nine minutes on a GPU: layers, tests, trainings, FP8, memory, times; installs nothing
# make install-container  into the Python at hand (NVIDIA's PyTorch container), replacing no package
# make clean     remove the demo's output and caches, keep .venv
SHELL := /bin/bash
PY := .venv/bin/python
TE ?= required
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)

.PHONY: demo test lint format gpu-check install-container constraints venv clean

venv:
	@tools/setup_venv.sh

demo: venv
	@$(PY) -m megatron_dynmoe.demo $(DEMO_ARGS)

test: venv
	@tools/setup_venv.sh te || [ "$(TE)" != required ]
	@TE=$(TE) $(PY) -m pytest -q $(PYTEST_ARGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

gpu-check:
	@$(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

# Each round installs what the last one made visible: what a missing package requires is unknown until it is there.
install-container:
	$(or $(PYTHON),python3) -m pip install --no-deps . packaging
	@while missing=$$($(or $(PYTHON),python3) -m megatron_dynmoe.doctor --missing) && [ -n "$$missing" ]; do \
	    $(or $(PYTHON),python3) -m pip install --no-deps -c constraints.txt $$missing || exit 1; \
	done
	@$(or $(PYTHON),python3) -m megatron_dynmoe.doctor

constraints: venv
	@{ head -n 1 constraints.txt; .venv/bin/uv pip freeze -q --exclude-editable | grep -vE '^pip==| @ '; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
