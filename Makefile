# make quickstart   makes the environment and trains examples/sortmix8.toml
# make check        the quick checks and tests, while you work
# make test         all of them, as CI does
# make help         the rest

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough and can make environments; set PYTHON to choose another.
PYTHON ?= $(shell for python in python3.11 /usr/bin/python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PYTEST_ARGS ?=
# Files of tests that `make test` runs at the same time: many of them wait for processes.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 7 ? n + 1 : 8)))
# Engines with an environment of their own.
ENGINES ?= $(basename $(notdir $(wildcard deploy/engines/*.lock)))

# Stamps: installed again when the requirements change, else at no cost.
RUNTIME := $(VENV)/installed-all
DEVELOPMENT := $(VENV)/installed-all-dev

KILLS ?= 200
INPUTS ?= 1000000
SEED ?=

.PHONY: help quickstart env engine-env check test test-engines chaos fuzz lint lint-python lint-proto format proto \
	deploy-check diagrams push-chaos clean

help: ## shows this list
	@grep -hE '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | sed 's/:.* ## /\t/' | expand -t 16

quickstart: $(RUNTIME) ## trains the first example: replay buffer, two inference servers and learner on this machine
	$(BIN)/leeway run examples/sortmix8.toml

env: $(DEVELOPMENT) ## makes .venv with everything needed to run, test and check

engine-env: | $(BIN)/python ## makes the environment of ENGINE=vllm and prints its interpreter
	@$(BIN)/python deploy/engines/build $(ENGINE)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Leeway needs Python 3.11 or newer with venv; install it or set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[all]' --constraint constraints.txt
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[all,dev]' --constraint constraints.txt
	@touch $@

# Types are left to `make lint`: pyright alone takes a minute and a half.
check: env ## ruff, import contracts and every quick test that starts no process: two minutes on two cores
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit tests/contract tests/model -m 'not processes and not slow' \
		--numprocesses logical --dist loadfile $(PYTEST_ARGS)

test: env lint ## lint, then every test but those of the engines with environments of their own
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# An environment that cannot be made is reported as skipped, with the reason, by the tests that need it.
test-engines: env ## one suite for every engine, each in its own environment, which is made first
	@for engine in $(ENGINES); do \
		timeout 1200 $(BIN)/python deploy/engines/build $$engine || echo "the environment of $$engine could not be made; its tests are skipped" >&2; \
	done
	$(BIN)/pytest tests/engines -m engines $(PYTEST_ARGS)

chaos: env ## a rehearsal under fire: KILLS=200 processes killed with loss of power, bad network, full disk, clock jumps; SEED=N repeats one
	$(BIN)/python -m tests.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

fuzz: env ## INPUTS=1000000 arbitrary and mutated inputs for every RPC and the log reader; SEED=N repeats some
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED))

lint: lint-python lint-proto ## style, types, import contracts, the wire contract

lint-python: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

lint-proto: env
	$(BIN)/buf lint proto
	$(BIN)/buf format proto --diff --exit-code
	proto/generate --check
	$(BIN)/python proto/baseline.py

format: env ## formats Python and proto files
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format
	$(BIN)/buf format proto --write

proto: ## generates leeway/v1 from proto/leeway/v1
	proto/generate

diagrams: ## draws docs/architecture.svg from docs/architecture.dot; needs graphviz
	dot -Tsvg -o docs/architecture.svg docs/architecture.dot
	@printf '<!-- drawn from %s -->\n' "$$(sha256sum < docs/architecture.dot | cut -d ' ' -f 1)" >> docs/architecture.svg

push-chaos: env ## pushes weights PUSHES times under kills and corruption; 1000 unless set
	$(BIN)/python -m tests.push --pushes $(or $(PUSHES),1000)

deploy-check: env ## checks Dockerfiles, compose file and Prometheus configuration
	deploy/check

clean: ## removes the environment and everything generated
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
