"""The systems of bench_model.py, one per process: python model_systems.py SYSTEM WORK THREADS.

Prints one JSON line when loaded ({} or {"refused": reason}); then, for each line on its input, measures once and prints
{"prefill_s", "decode_s": [..]}. All run random weights of one shape, so only their speed can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFILL_TOKENS = 512
DECODE_TOKENS = 24
CONTEXT = PREFILL_TOKENS + DECODE_TOKENS
SEED = 1
# DeepSeekMoE-16B's attention and experts under a class that all three systems have (it adds a gate of [1, H] to the
# shared expert, which is two experts wide)
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 2816,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

# what the names of moec's systems stand for: q4_0 stores every matrix in 4 bits, 32 values to a scale
WEIGHTS = {"int4": "experts=int4-g32,attention=int4-g32,lm_head=int4-g32"}

Feed = Callable[[list[int]], None]
"""Feeds tokens after those before."""
Start = Callable[[], Feed]
"""Begins a sequence with an empty cache."""


def moec_system(weights: str, work: Path, threads: int) -> Start:
    """The engine, made on first use and kept in the work folder."""
    import torch

    import moec

    torch.set_num_threads(threads)
    folder, engine_path = work / "model", work / f"{weights}.engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if not engine_path.exists():
        stored = WEIGHTS.get(weights, weights)
        moec.compile(str(folder), weights=stored, random_weights=SEED, verify="off", output=engine_path)
    engine = moec.load(engine_path)

    def start() -> Feed:
        cache = engine.new_cache(1, CONTEXT)
        slot = cache.allocate()
        return lambda tokens: engine.step(cache, [slot], [tokens]).float().argmax(-1).item()

    return start


def transformers_system(experts: str, work: Path, threads: int) -> Start:
    """transformers eager with an experts implementation of its own registry."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, Qwen2MoeConfig

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    config = Qwen2MoeConfig(**CONFIG)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).eval()
    torch.set_default_dtype(default)

    def start() -> Feed:
        cache = DynamicCache(config=config)

        def feed(tokens: list[int]) -> None:
            with torch.inference_mode():
                ids = torch.tensor([tokens])
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                logits[0, -1].argmax().item()

        return feed

    return start


def llama_cpp_system(weights: str, work: Path, threads: int) -> Start:
    """llama.cpp through llama-cpp-python's C interface. weights: "bf16" or "q4_0".

    Its packed form of q4_0 is the fastest for single tokens and ends the process with batches (0.3.36): prompts go to a
    second copy that is not packed, and single tokens follow an empty context, which is in its favour.
    """
    import llama_cpp
    import numpy as np

    path = work / f"{weights}.gguf"
    if not path.exists():
        write_gguf(path, weights)
    llama_cpp.llama_backend_init()
    prompts = _llama_context(path, threads, packed=weights == "bf16")
    singles = prompts if weights == "bf16" else _llama_context(path, threads, packed=True)

    def start() -> Feed:
        for context in (prompts, singles):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

        def feed(tokens: list[int]) -> None:
            context = prompts if len(tokens) > 1 else singles
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
                raise RuntimeError("llama_decode failed")
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            int(np.ctypeslib.as_array(logits, (CONFIG["vocab_size"],)).argmax())

        return feed

    return start


def _llama_context(path: Path, threads: int, packed: bool) -> Any:
    """packed: weights in the layouts of its kernels, else as in the file."""
    import llama_cpp

    model_options = llama_cpp.llama_model_default_params()
    model_options.use_extra_bufts = packed
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT + 8, PREFILL_TOKENS, PREFILL_TOKENS
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    if not model or not context:
        raise RuntimeError(f"llama.cpp could not load {path.name}")
    return context


def write_gguf(path: Path, weights: str) -> None:
    """The same shape with random weights as a GGUF file; router, norms and biases stay f32, as llama.cpp's tools do."""
    import gguf
    import numpy as np

    kind = {"bf16": gguf.GGMLQuantizationType.BF16, "q4_0": gguf.GGMLQuantizationType.Q4_0}[weights]
    hidden, inner, experts = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["num_experts"]
    shared, vocab, heads = CONFIG["shared_expert_intermediate_size"], CONFIG["vocab_size"], 16
    writer = gguf.GGUFWriter(str(path), "qwen2moe", use_temp_file=True)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(CONFIG["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(shared)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(SEED)
    pool = (rng.standard_normal(1 << 22) * 0.02).astype(np.float32)

    def add(name: str, *shape: int, full: bool = False) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.zeros(shape, np.float32) if "bias" in name else np.ones(shape, np.float32))
            return
        values = np.resize(pool, shape)
        if full:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    add("output.weight", vocab, hidden)
    for i in range(CONFIG["num_hidden_layers"]):
        block = f"blk.{i}"
        add(f"{block}.attn_norm.weight", hidden)
        for part in ("attn_q", "attn_k", "attn_v"):
            add(f"{block}.{part}.weight", hidden, hidden)
            add(f"{block}.{part}.bias", hidden)
        add(f"{block}.attn_output.weight", hidden, hidden)
        add(f"{block}.ffn_norm.weight", hidden)
        add(f"{block}.ffn_gate_inp.weight", experts, hidden, full=True)
        add(f"{block}.ffn_gate_exps.weight", experts, inner, hidden)
        add(f"{block}.ffn_up_exps.weight", experts, inner, hidden)
        add(f"{block}.ffn_down_exps.weight", experts, hidden, inner)
        add(f"{block}.ffn_gate_inp_shexp.weight", hidden)
        add(f"{block}.ffn_gate_shexp.weight", shared, hidden)
        add(f"{block}.ffn_up_shexp.weight", shared, hidden)
        add(f"{block}.ffn_down_shexp.weight", hidden, shared)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(start: Start, rng: Any) -> dict[str, Any]:
    """One prefill into an empty cache and single tokens after it, fresh tokens each time."""
    feed = start()
    before = time.perf_counter()
    feed(rng.integers(0, CONFIG["vocab_size"], PREFILL_TOKENS).tolist())
    prefill, decode = time.perf_counter() - before, []
    for token in rng.integers(0, CONFIG["vocab_size"], DECODE_TOKENS).tolist():
        before = time.perf_counter()
        feed([token])
        decode.append(time.perf_counter() - before)
    return {"prefill_s": prefill, "decode_s": decode}


def main() -> None:
    import numpy as np

    name, work, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    family, _, detail = name.partition(":")
    makers = {"moec": moec_system, "transformers": transformers_system, "llama.cpp": llama_cpp_system}
    defaults = {"moec": "bf16", "transformers": "grouped_mm", "llama.cpp": "bf16"}
    try:
        start = makers[family](detail or defaults[family], work, threads)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(json.dumps({"refused": f"{type(error).__name__}: {reason}"}), flush=True)
        return
    print("{}", flush=True)
    rng = np.random.default_rng(SEED)
    for _ in sys.stdin:
        print(json.dumps(measure(start, rng)), flush=True)


if __name__ == "__main__":
    main()
