PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml Makefile | cksum | cut -d' ' -f1)

.PHONY: setup demo tune-demo test chaos check bench lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; make setup PYTHON=/path/to/it"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	rm -f .venv/.installed-* && touch $@

demo: setup ## the whole loop on sounds it makes itself, under ten minutes on two cores
	$(BIN)/clearsep demo

tune-demo: setup ## a search for a schedule of thresholds on the same sounds, under 15 minutes on two cores
	$(BIN)/clearsep tune demo -o runs/tune-demo

test: setup ## all tests, slow ones too
	$(BIN)/python -m pytest

chaos: setup ## a run on two Ray nodes, interrupted 60 times at seeded moments, against an undisturbed one
	$(BIN)/python -m tests.support.chaos --points 60 --seed 0 --report benchmarks/chaos.md

check: setup ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p engine -p train -p tune -p cluster

bench: setup ## every table of the README; needs ESC10=folder with clips.csv and audio/
	@test -n "$(ESC10)" || { echo "make bench ESC10=folder with clips.csv and audio/"; exit 1; }
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/tracks.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/scoring.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/esc10.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/truth.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/fooling.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/gain.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/esc10_search.py --esc10 $(ESC10)
	$(BIN)/python benchmarks/sharing.py
	$(BIN)/python benchmarks/nodes.py
	$(BIN)/python benchmarks/scaling.py

lock: setup ## renew requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet -o requirements.lock

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache *.egg-info
