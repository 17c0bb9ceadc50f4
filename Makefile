# make demo   installs, fine-tunes the shipped model on real reviews, scores it before and after
# make test   installs what the tests need and runs them
# make gpu    on a machine with a GPU: the tests that need one, then the benchmark; writes gpu.json
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test gpu lint slow soak

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(INSTALL) -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/python generate.py configs/finetune_mini_config.py
	$(BIN)/python train.py configs/finetune_mini_config.py
	$(BIN)/python generate.py --init_from=resume --out_dir=out-mini

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two processes of one thread each; the one that is done takes tests from the other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal

gpu: .venv/installed-dev
	$(BIN)/python -m pytest -vv -rs -m gpu tests/running/test_gpu.py

# What takes long and seldom tells: more seeds, more machines, more wrong answers to the homework
slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow
	DAMAGES=3 $(BIN)/python -m pytest tests/program/test_damaged_files.py

# 300 kills instead of the 10 of `make test`
soak: .venv/installed-dev
	$(BIN)/python tests/running/soak.py 300
