# make serve | test | check | install | dist | bench ... ; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
SERVE_ARGS ?=
STAMP := $(VENV)/.installed

.PHONY: help install serve test lint check dist smoke-wheel test-oldest bench bench-smoke ledger-chaos chaos chaos-smoke clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; say which with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "Can't make $(VENV): on Debian and Ubuntu install python3-venv first." >&2; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip && \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,formats]' --group dev || \
	  { echo "The packages could not be installed: is the package index reachable? PIP_INDEX_URL names a mirror." >&2; exit 1; }
	@touch $@

install: $(STAMP)  ## client, server, embedded engine and development tools into .venv

serve: $(STAMP)  ## fetch the default model if needed and serve it on PORT (8000)
	@exec $(BIN)/deepseek-api serve --port $(PORT) $(SERVE_ARGS)

# Processes that run tests. A file's tests stay together, in this order: the quick files come last.
TEST_PROCESSES ?= 2
PARALLEL = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## lint, types, layers, and the tests that start no service
	$(BIN)/python -m pytest $(PARALLEL) --ignore tests/service --ignore tests/seeds

dist: $(STAMP)  ## sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:  ## remove everything that make made here
	rm -rf $(VENV) .venv310 .venv-openai028-* .venv-migration dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/bin
	rm -rf tests/migration/node/node_modules

smoke-wheel: dist  ## the wheel in clean environments: client, [server], [embedded], each used
	$(BIN)/python tools/smoke_wheel.py dist

ledger-chaos: $(STAMP)  ## kill -9 at 200 random moments: the ledger must know of every request (minutes)
	LEDGER_CHAOS_MOMENTS=200 $(BIN)/python -m pytest -s tests/service/test_ledger_chaos.py

CHAOS_SECONDS ?= 1800
chaos: $(STAMP)  ## half an hour of load while engines and workers die, hang and lie; CHAOS_SECONDS=, CHAOS_SEED=
	PYTHONPATH=tests $(BIN)/python -m chaos --seconds $(CHAOS_SECONDS) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

chaos-smoke: $(STAMP)  ## the same for less than two minutes
	PYTHONPATH=tests $(BIN)/python -m chaos --seconds 45 --clients 12 --seed 3

# What differs there is the language and the libraries. These tests add only more of the same, thousands of requests
# and deaths at random moments, so that once, in `make test`, is enough; as is `make test-vllm`.
ENDURANCE := $(addprefix tests/service/test_,full_disk.py ledger_chaos.py overload.py survival.py vllm.py)

OLD_PYTHON ?= python3.10
test-oldest: .venv310/.installed  ## the tests on Python 3.10 with the lowest versions that pyproject.toml allows
	.venv310/bin/python -m pytest $(PARALLEL) $(addprefix --ignore ,tests/seeds $(ENDURANCE))

.venv310/.installed: pyproject.toml tools/lowest.py
	@test -x .venv310/bin/python || $(OLD_PYTHON) -m venv .venv310
	.venv310/bin/python tools/lowest.py > .venv310/lowest.txt
	.venv310/bin/python -m pip install --quiet --upgrade pip
	.venv310/bin/python -m pip install --quiet -c .venv310/lowest.txt -e '.[embedded,formats]' --group dev
	@touch $@

bench: $(STAMP)  ## compare the gateway with nginx and the engine asked directly (minutes)
	$(BIN)/python -m bench.gateway
	$(BIN)/python -m bench.engine

bench-smoke: $(STAMP)
	$(BIN)/python -m bench.gateway --quick

.PHONY: migration migration-python migration-node
migration: migration-python migration-node  ## other clients, unchanged, against the service

migration-python: $(STAMP)  ## openai 0.28, 1, 2, 3, LangChain, LlamaIndex, llm; each in .venv-migration/
	$(BIN)/python tools/migration_envs.py
	$(BIN)/python -m pytest tests/migration/test_python.py

NODE_CLIENTS := tests/migration/node/node_modules/.installed
$(NODE_CLIENTS): tests/migration/node/package.json
	cd $(dir $<) && npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error
	@touch $@

migration-node: $(STAMP)  ## openai-node, Vercel's AI SDK and curl; Node 18 or later
	@if node -e 'process.exit(+(parseInt(process.versions.node) < 18))' 2>/dev/null && command -v npm >/dev/null; \
	then $(MAKE) --no-print-directory $(NODE_CLIENTS); \
	else echo "No Node 18 or later here: its clients are not tested."; fi
	$(BIN)/python -m pytest tests/migration/test_node.py tests/migration/test_curl.py tests/migration/test_documents.py

.PHONY: vllm-venv test-vllm
VLLM_BASE ?= python3.11
vllm-venv:  ## an environment in which vLLM runs on the CPU, into .venv-vllm (2.5 GB)
	tools/vllm_venv.sh .venv-vllm $(VLLM_BASE)

test-vllm: $(STAMP) vllm-venv  ## a real vLLM serves the tiny DeepSeek-V3, token by token as it should
	$(BIN)/python -m pytest tests/service/test_vllm.py
