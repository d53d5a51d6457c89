PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml Makefile | cksum | cut -d' ' -f1)

.PHONY: setup demo tune-demo test test-fast chaos check docs bench lock clean

setup: $(STAMP) ## install the locked dependencies and this project into .venv

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python must be 3.11 or newer; run make setup PYTHON=/path/to/it"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	rm -f .venv/.installed-* && touch $@

demo: setup ## run the whole loop on synthesised sounds, under ten minutes on two cores
	$(BIN)/clearsep demo

tune-demo: setup ## search for a schedule of thresholds on the same sounds, under 15 minutes on two cores
	$(BIN)/clearsep tune demo -o runs/tune-demo

# Many processes share the cores: their idle threads must sleep, not spin (benchmarks/log.md). Each test file has a Ray
# of its own, so two files can run at once.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: setup ## run all tests, slow ones too
	$(PYTEST)

test-fast: setup ## run the tests that neither start Ray nor train, about 6 minutes
	$(PYTEST) -m "not slow"

chaos: setup ## interrupt runs on two Ray nodes 60 times at seeded moments and compare them with an undisturbed run
	$(BIN)/python -m tests.support.chaos --points 60 --seed 0 --report benchmarks/chaos.md

check: setup ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p engine -p train -p tune -p cluster

docs: setup ## build the documentation as a site in site/, which works from disk; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

bench: setup ## write every table of README.md and docs/results.md; needs ESC10=folder with clips.csv and audio/
	@test -n "$(ESC10)" || { echo "ESC10 must be set; run make bench ESC10=FOLDER with clips.csv and audio/"; exit 1; }
	$(BIN)/python -m benchmarks.speed.overhead
	$(BIN)/python -m benchmarks.speed.tracks
	$(BIN)/python -m benchmarks.speed.training --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.gpu --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.scale.scale
	$(BIN)/python -m benchmarks.speed.scoring --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.speed.separators --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.quality.esc10 --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.quality.truth --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.quality.fooling --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.quality.gain --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.labels.labels --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.labels.slope --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.text.zero_shot --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.quality.esc10_search --esc10 $(ESC10)
	$(BIN)/python -m benchmarks.scale.sharing
	$(BIN)/python -m benchmarks.scale.nodes
	$(BIN)/python -m benchmarks.scale.scaling

lock: setup ## update requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet -o requirements.lock

clean: ## remove everything that make has built
	rm -rf .venv runs site .mypy_cache .ruff_cache .pytest_cache *.egg-info
