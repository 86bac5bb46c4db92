# make quickstart   aligns the toy world's model and shows that it got better (about 3 minutes)
# make quickstart FAMILY=flow   the same of its flow twin, a small Stable Diffusion 3
# make test-fast    a selection of the tests, within a minute on two cores
# make test         the default tests (about five minutes on two cores)
# make docs         builds the documentation site into site/
# Each sets up .venv first, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := quickstart$(addprefix -,$(FAMILY))

.PHONY: quickstart test test-fast test-slow check format docs toy-world toy-flow toy-lcm

quickstart: $(INSTALLED)
	$(BIN)/lit-prefopt fit --config $(QUICKSTART) \
		--trainer.default_root_dir runs/$(QUICKSTART)-$(shell date +%Y%m%d-%H%M%S)

# One process a core, and one thread in each of them and in the runs that they start.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

test: $(INSTALLED)
	$(PYTEST) --dist worksteal

# One short run, which comes first since it is the longest; pure functions, data, parsing, every loss
# at step zero.
FAST := test_cli.py::test_fit_from_recipe_to_weights[full] \
	methods/test_methods.py::test_step_zero test_losses.py test_metrics.py test_coming_from.py \
	test_direction.py test_room_pages.py data/order data/test_images.py diffusion evaluate/report \
	experiments prepare prompts

test-fast: $(INSTALLED)
	$(PYTEST) --dist worksteal $(addprefix tests/,$(FAST)) \
		--ignore tests/evaluate/report/test_mutated_results.py

# The tests of a file stay on one worker, which makes the runs that they have in common once.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow --dist loadfile

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

# The toy world's flow twin, trained around the shipped VAE and CLIP.
toy-flow: $(INSTALLED)
	$(BIN)/python -m lit_prefopt.toy.assemble_flow --transformer configs/toy/flow.json \
		--output runs/toy/flow/parts
	$(BIN)/lit-prefopt fit --config configs/toy/flow.yaml
	$(BIN)/python -m lit_prefopt.toy.assemble_flow \
		--transformer runs/toy/flow/weights/transformer --output runs/toy/flow/pipeline

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
	$(BIN)/lit-prefopt fit --help > /dev/null  # keeps the help pages, from which later ones are read
	touch $@
