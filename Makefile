# make demo   set up .venv, run the main job on synthetic data, print the result table, write runs/demo/report.html
# make test   set up .venv, run the whole test suite
# make bench  set up .venv, run the benchmarks beside other projects' losses, write build/bench/report.md
# make lint   check style; make format mends it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PEERS := build/peers
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: demo test bench lint format clean

demo: $(READY)
	$(BIN)/mmfast experiment --preset demo

test: $(READY)
	$(BIN)/python -m pytest python_tests

bench: $(READY) $(PEERS)/ready
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest benchmarks --benchmark-json build/bench.json
	$(BIN)/python benchmarks/report.py build/bench.json build/bench

# Without what these packages need: benchmarks/peers.py loads one file of each, and has a transcription.
$(PEERS)/ready: $(READY)
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS) \
	    lightly==1.6.0 solo-learn==1.0.2 monai==1.6.1 catalyst==22.4 \
	    pytorch-metric-learning==2.9.0 info-nce-pytorch==0.1.4 tqdm
	@mkdir -p $(PEERS) && touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Python files need no rebuild: the package is installed in place.
$(READY): pyproject.toml setup.py constraints.txt $(CXX_FILES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "mmfast: Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "mmfast: no virtual environment: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --editable '.[train,test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build runs mmfast.egg-info mmfast/_build.json mmfast/_C.*
