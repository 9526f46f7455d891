# make demo | make test | make check: each sets itself up first; a second call does not install again.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test check format bench gpu clean

# Installed means the stamp is newer than what it was made from; a stopped install leaves no stamp and is repeated.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "triscale needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "no virtual environment: python3 lacks venv (on Debian, the package python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (torch is large: this takes minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]' || \
	  { echo "the installation did not finish; 'make $(MAKECMDGOALS)' goes on with it" >&2; exit 2; }
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/triscale demo

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --durations=0 tests/test_layers.py

format: $(VENV)/.installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.run

# Installs nothing, for a machine with a GPU may reach no index: takes the environment if it is there, else the system's Python.
# make gpu PARTS="tests kernels-b0" MINUTES=25 CARRIED=runs/carried
gpu:
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu $(PARTS) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(CARRIED),--carried $(CARRIED))

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
