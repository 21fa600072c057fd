# Needs Python 3.11 and Debian's tools; everything else comes from locks/ into .envs/.
PYTHON ?= python3
ARGS ?=
BIN := .envs/vllm/bin
REAL_API := $(addprefix planner_sidecar/kubernetes/real_,api.py autoscaler.py foreign.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-kubernetes test-kubernetes-engines test-planner-engines lint bench soak soak-proxy wheel clean vllm-env sglang-env vllm-versions

help: ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=/path/to/python3.11]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

demo: vllm-env ## the main job on real engines
	$(BIN)/python -m demo $(ARGS)

test: vllm-env sglang-env vllm-versions ## builds the environments from locks/, runs every test once (ARGS: for pytest)
	$(BIN)/python -m pytest $(ARGS)

# Built once (as root: it installs Debian packages), then kept; KUBE_HOME says where.
test-kubernetes: vllm-env ## the planner against a real Kubernetes API server built from Debian's source package
	planner_sidecar/kubernetes/api_server.sh build
	run=$$(planner_sidecar/kubernetes/api_server.sh start) && \
	trap 'planner_sidecar/kubernetes/api_server.sh stop' EXIT && \
	KUBE_RUN=$$run $(BIN)/python -m pytest $(REAL_API) --timeout 600 $(ARGS)

test-kubernetes-engines: vllm-env ## fifty scale-downs of real vLLM engines under load, on the same API server (SCALE_DOWNS=50)
	planner_sidecar/kubernetes/api_server.sh build
	run=$$(planner_sidecar/kubernetes/api_server.sh start) && \
	trap 'planner_sidecar/kubernetes/api_server.sh stop' EXIT && \
	KUBE_RUN=$$run $(BIN)/python -m pytest planner_sidecar/kubernetes/real_engines.py -s -o faulthandler_timeout=3000 $(ARGS)

test-planner-engines: vllm-env ## prefill and decode pools of real vLLM engines go up and down under load
	$(BIN)/python -m pytest planner_sidecar/engines/real_pools.py -s -o faulthandler_timeout=3000 $(ARGS)

lint: vllm-env ## ruff, and mypy --strict on our packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: vllm-env ## figures with a peer or a floor in the same run (ARGS: names of benches)
	$(BIN)/python -m benchmarks $(or $(ARGS),all)

soak: vllm-env ## half an hour of load and faults on a real engine (ARGS: --minutes 5)
	$(BIN)/python -m soak $(ARGS)

soak-proxy: vllm-env sglang-env ## twenty minutes of failing engines behind the proxy (ARGS: --minutes 5 --sglang 0)
	$(BIN)/python -m soak.proxy $(ARGS)

wheel: vllm-env ## dist/: the pure wheel, and one with the proxy's hot modules compiled (needs a C compiler)
	$(BIN)/python -m hatchling build -t wheel -d dist
	DYNAMO_COMPILE=1 $(BIN)/python -m hatchling build -t wheel -d dist

clean: ## removes environments, build output and caches
	rm -rf .envs .build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

vllm-env:
	$(PYTHON) tools/bootstrap.py vllm

sglang-env:
	$(PYTHON) tools/bootstrap.py sglang sglang-0.5.14

vllm-versions:
	$(PYTHON) tools/bootstrap.py vllm-0.24 vllm-0.33
