# make quickstart   aligns the toy world's model and shows that it got better (about 3 minutes)
# make test         the default tests (about five minutes on two cores)
# make docs         builds the documentation site into site/
# Each sets up .venv first, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-slow check format docs toy-world toy-lcm

quickstart: $(INSTALLED)
	$(BIN)/lit-prefopt fit --config quickstart \
		--trainer.default_root_dir runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# One process a core, and one thread in each of them and in the runs that they start.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Warnings, such as a broken link, are errors; nothing is fetched.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site: site/index.html; its search needs a server: $(BIN)/python -m http.server --directory site"

# The shipped toy checkpoint and pairs, made again from nothing into runs/toy (about an hour).
toy-world: $(INSTALLED)
	$(BIN)/lit-prefopt fit --config configs/toy/vae.yaml
	$(BIN)/lit-prefopt fit --config configs/toy/clip.yaml
	$(BIN)/python -m lit_prefopt.toy.assemble --parts runs/toy --output runs/toy/parts
	$(BIN)/lit-prefopt fit --config configs/toy/unet.yaml
	$(BIN)/python -m lit_prefopt.toy.assemble --parts runs/toy --unet runs/toy/unet/weights/unet \
		--output runs/toy/checkpoint
	$(BIN)/python -m lit_prefopt.toy.make_pairs --checkpoint runs/toy/checkpoint \
		--output runs/toy/pairs

# The toy world's latent consistency model, distilled from the shipped checkpoint.
toy-lcm: $(INSTALLED)
	$(BIN)/lit-prefopt fit --config configs/toy/lcm.yaml
	$(BIN)/lit-prefopt export --source runs/toy/lcm --to pipeline --output runs/toy/lcm/pipeline

# open_clip, which judges are compared with, comes alone: the torchvision that it asks for may not fit
# the installed torch, and no test needs it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open_clip_torch
	touch $@
