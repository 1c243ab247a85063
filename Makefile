# `make run` lets the embedded model answer, `make test` runs every check. Both set up .venv first, where that is needed.
PYTHON ?= python3
PROMPT ?= examples/lookup.txt
BIN := .venv/bin
SOURCES := $(shell find src -type f -not -name '*.pyc') pyproject.toml CMakeLists.txt README.md LICENSE

.PHONY: run test format sanitize clean

run: .venv/installed
	$(BIN)/tightfit run --memory 600MiB --file $(PROMPT) --max-new-tokens 6 $(ARGS)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize:
	cmake -S . -B build/sanitize -DTIGHTFIT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize --parallel 2
	for test in build/sanitize/*_test; do $$test || exit 1; done

clean:
	rm -rf .venv build

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "tightfit needs Python 3.10 or newer, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created constraints.txt $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt .
	touch $@

.venv/installed-test: .venv/created constraints.txt $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt '.[test]'
	touch $@ .venv/installed
