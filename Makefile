# make setup | demo | test | lint | kernels | tiny-r1      (each sets up what is missing first)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The editable install links each file, so that type checkers can follow; a file more or less means installing again. So does
# a change of what is compiled.
FILES := $(sort $(shell find . -name '*.py' -not -path './$(VENV)/*' -not -path './build/*'))
NATIVE := $(wildcard kernels/cpu/native/* actors/native/*)
STAMP := $(VENV)/.installed-$(firstword $(shell (echo $(FILES); cat $(NATIVE)) | cksum))
# Without a compiler Moray is installed without its native libraries, which a strict editable install does not allow.
COMPILERS := $(shell $(PYTHON) -c 'import os, shutil, sysconfig as s; \
	print(all(shutil.which((os.environ.get(name) or s.get_config_var(name) or name).split()[0]) for name in ("CC", "CXX")))')
EDITABLE := --editable '.[dev]' $(if $(filter True,$(COMPILERS)),--config-settings editable_mode=strict)
PORT ?= 8000

# Explicit everywhere: unset, Ray would turn token authentication on and write a token into the home directory.
export RAY_AUTH_MODE ?= disabled

.PHONY: setup demo test lint kernels tiny-r1 clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Moray needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build/__editable__* kernels/cpu/_native*.so actors/_native*.so
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(EDITABLE)
	rm -f $(VENV)/.installed-*
	touch $@

# Starts Ray + Serve, asks one question, prints the thinking and the answer; ONCE=1 stops after it.
demo: setup
	$(BIN)/python -m moray.cluster.demo --port $(PORT) $(if $(ONCE),--once)

# Beside the tests that need no Ray: that of many machines, which waits for Ray for most of its minutes, and the numbers of
# the kernels once more, interpreted: Triton decides when it is imported whether a process interprets or compiles them.
test: setup lint
	mkdir -p build/tests
	($(BIN)/python -m pytest -m machines && TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/numerics) \
		>build/tests/beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest -m 'not ray and not machines'; status=$$?; \
	wait $$beside || status=$$?; cat build/tests/beside.log; exit $$status
	$(BIN)/python -m pytest -m 'ray and not machines'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moray
	$(BIN)/mypy --explicit-package-bases tests

# Compiles every kernel for six GPU generations, none of which needs to be here, and prints what came out.
kernels: setup
	$(BIN)/python -m moray.kernels.table

# Trains the embedded model again: about an hour and a half on two idle CPU cores.
tiny-r1: setup
	$(BIN)/python -m moray.model.tiny_r1.training.train --out build/tiny-r1

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
