# `make demo` turns the example photograph into a video on any machine; `make test` runs every test.
# Both need python3 >= 3.11 and nothing else. VENV=folder and PYTHON=python3.12 choose others,
# WORKERS=N the number of test processes.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 4 ] && echo $$((n + 1)) || echo 4)
BIN := $(VENV)/bin

# uv does not read PIP_FIND_LINKS, and fails on a folder that is not there.
INSTALL = UV_COMPILE_BYTECODE=1 $(if $(PIP_FIND_LINKS),$(if $(wildcard $(PIP_FIND_LINKS)/.),UV_FIND_LINKS="$(PIP_FIND_LINKS)")) \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt

# Where Python may not keep its bytecode, each of the demo's processes compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help demo test fault check lint constraints audit clean

help:
	@echo "make demo         examples/portrait.jpg -> out/frame.png and out/video.mp4, on this machine"
	@echo "make test         install everything for the tests, torch too, and run them"
	@echo "make fault        the fault suite in its long form: hours of kills and outages; a table at the end"
	@echo "make check        ruff, mypy and the tests: what CI runs"
	@echo "make constraints  resolve the dependencies anew into constraints.txt"
	@echo "make audit        compare constraints.txt with the published advisories; needs PyPI itself, not a mirror"
	@echo "make clean        remove the environment, the caches and out/"

demo: $(VENV)/.local
	env -u VIDGEN_GATEWAY_URL $(BIN)/vidgen run examples/portrait.jpg \
		--edit "golden hour light, warm and cinematic" --motion "slow zoom in, a little hand-held" \
		-o out/video.mp4 --frame out/frame.png

# One more than there are cores, for much of a test is waiting. A file stays in one process, which shares its servers;
# files go out in the order of tests/conftest.py.
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

fault: $(VENV)/.test
	$(BIN)/python -m tests.fault $(ARGS)

check: lint test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without torch and its CUDA: their builds differ by machine, and a pin would hold one build fast.
constraints: | $(VENV)/.uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras pyproject.toml --no-header --no-annotate \
		--upgrade -o $(VENV)/constraints.txt
	sed -E -e '/^(torch|torchvision|triton)==/d' -e '/^cuda-/d' -e '/^nvidia-ml-py==/!{/^nvidia-/d;}' \
		$(VENV)/constraints.txt > constraints.txt

# Strict: what could not be looked up is a failure, or a mirror without advisories would pass for a clean bill.
audit: | $(VENV)/.uv
	$(BIN)/uv tool run pip-audit==2.10.1 --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: a second call installs nothing unless what is to be installed has changed.
$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "vidgen needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(VENV)/.local: pyproject.toml constraints.txt | $(VENV)/.uv
	$(INSTALL) -e ".[local]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.uv
	$(INSTALL) -e ".[test]"
	@touch $(VENV)/.local $@
