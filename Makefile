# make quickstart   install, then train a small Qwen3 on Python's own library and let it write code
# make test         the tests;  make test-slow, those that take longer;  make lint;  make bench [CONFIG=...]
# TORCH names the torch to install, for example TORCH=torch==2.10.0 or a wheel of a CPU-only build.

TORCH ?= torch>=2.10
PYTHON ?= python3
CONFIG ?= configs/quickstart.toml
PY := .venv/bin/python

.PHONY: quickstart test test-slow lint bench

quickstart: .venv/ready
	$(PY) tools/prepare_data.py "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --suffixes .py \
		--exclude test tests site-packages idlelib lib2to3 __pycache__ --train-tokenizer 4096 --out runs/quickstart/data --overwrite
	rm -rf runs/quickstart/run
	$(PY) -m minitrain --config configs/quickstart.toml

test: .venv/ready
	$(PY) -m pytest -m 'not slow'

test-slow: .venv/ready
	$(PY) -m pytest -m slow

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/ready
	$(PY) tools/bench_step.py --config $(CONFIG)

.venv/ready: .venv/torch pyproject.toml setup.py $(wildcard kernels/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minitrain needs Python 3.11 or later; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev,data]'
	@$(PY) -c 'import importlib.util; print("CUDA extension:", "built" if importlib.util.find_spec("minitrain.kernels") \
		else "not built, no nvcc on the path; torch does its work")'
	touch $@

.venv/torch: FORCE  # newer only when TORCH is another than last time
	@mkdir -p .venv && (echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@)

FORCE:
