"""Trains examples/data/tiny-moe, a small Qwen3-MoE language model, on the documentation text inside CPython.

    python examples/train_tiny_moe.py --out DIR             writes DIR/tiny-moe and DIR/heldout.txt
    python examples/train_tiny_moe.py --evaluate DIR/tiny-moe    prints the held-out perplexity and the expert load

The run is seeded: one machine, one Python and one --threads give the same weights. Training is in f32, the checkpoint
is bf16; perplexity and load are of the checkpoint as saved. Needs no network, and no more than moec's compiler does.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from documentation_text import read_documentation
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HELD_OUT_FILE = Path(__file__).parent / "data" / "heldout.txt"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1536
CONTEXT = 512
SEED = 20
BATCH = 4  # sequences of CONTEXT tokens in a step
MUON_LEARNING_RATE = 8e-3  # of the attention and expert matrices
ADAMW_LEARNING_RATE = 3e-3  # of the embedding, the routers and the norms
WARMUP_STEPS = 30
WEIGHT_DECAY = 0.1  # of the matrices only
BALANCE_COEFFICIENT = 0.002  # per layer; enough that no expert dies, too little to make the routing even
SHARD_SIZE = "4MB"  # two shards, as large checkpoints have


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out text. expert_load: f64[layers, E], the share of slots, each row adds up to 1."""

    perplexity: float
    bits_per_byte: float
    expert_load: torch.Tensor


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        if options.evaluate:
            console.print(report(evaluate_checkpoint(options.evaluate, HELD_OUT_FILE)))
        else:
            train_and_save(options.out, options.steps, console)
    except OSError as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    return 0


def train_and_save(out: Path, steps: int, console: Console) -> None:
    """Writes out/tiny-moe and out/heldout.txt after `steps` steps of training.

    Raises: FileExistsError: out/tiny-moe is there already; it is left as it is.
    """
    checkpoint, held_out_file = out / "tiny-moe", out / "heldout.txt"
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists and is kept as it is; give another --out or remove it first")
    started = time.monotonic()
    text = read_documentation()
    tokenizer = train_tokenizer(text.train)
    tokens = encode_documents(tokenizer, text.train)
    console.print(f"{sum(map(len, text.train)):,} characters of text, {len(tokens):,} tokens; {steps:,} steps")
    model = build_model()
    train(model, tokens, steps, console)

    out.mkdir(parents=True, exist_ok=True)
    held_out_file.write_text("\n\n".join(text.held_out) + "\n", encoding="utf-8")
    model.to(torch.bfloat16).save_pretrained(checkpoint, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(checkpoint)
    console.print(report(evaluate_checkpoint(checkpoint, held_out_file)))
    console.print(f"{checkpoint} written after {(time.monotonic() - started) / 60:.1f} minutes")


def train_tokenizer(documents: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of VOCAB_SIZE tokens: every text can be encoded, and decodes to itself. Token 0 ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: tuple[str, ...]) -> torch.Tensor:
    """i64[N]: the documents one after the other, an end-of-text token after each."""
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer.encode(document, verbose=False), tokenizer.eos_token_id]
    return torch.tensor(tokens)


def build_model() -> PreTrainedModel:
    """A seeded, untrained f32 model: 5 layers, 16 experts, 2 per token, 6 query heads over 2 key/value heads."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, console: Console) -> None:
    """Warm-up, then a cosine to zero; changes `model`. tokens: i64[N]."""
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    batches = _batches(tokens)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        mean_loss = math.nan
        for _ in range(steps):
            loss = _step(model, next(batches))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            mean_loss = loss if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * loss
            progress.update(task, advance=1, loss=mean_loss)
    model.eval()


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between two hidden layers, AdamW for the rest."""
    hidden, other, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            vectors.append(parameter)
        elif name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
            other.append(parameter)
        else:
            hidden.append(parameter)
    groups = [{"params": other, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(hidden, MUON_LEARNING_RATE, WEIGHT_DECAY),
        torch.optim.AdamW(groups, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), fused=True),
    ]


def _step(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Adds the gradients of one batch, i64[B, CONTEXT + 1]; returns the loss without its balancing part."""
    output = model(batch[:, :-1], use_cache=False, output_router_logits=True)
    loss = cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
    # One term for each layer: transformers' own sum over the layers lets an expert die where another makes up for it.
    config = model.config
    balance = sum(
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    )
    (loss + config.router_aux_loss_coef * balance).backward()
    return loss.item()


def _batches(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless i64[BATCH, CONTEXT + 1]: each epoch cuts the text at another offset and shuffles the pieces."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        pieces = (len(tokens) - offset - 1) // CONTEXT
        starts = offset + CONTEXT * torch.randperm(pieces, generator=generator)
        for chosen in starts.split(BATCH):
            yield tokens[chosen[:, None] + torch.arange(CONTEXT + 1)]


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear from 0 to 1 over WARMUP_STEPS, then half a cosine down to 0 at `steps`."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))


def evaluate_checkpoint(checkpoint: Path, text_file: Path, max_tokens: int | None = None) -> Evaluation:
    """Loads a checkpoint as f32 and evaluates it on the first `max_tokens` tokens of a text file (default: all)."""
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} has no config.json; expected the tiny-moe folder that --out made")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    tokens = tokenizer.encode(text_file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)[0]
    return evaluate(model, tokenizer, tokens[:max_tokens])


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> Evaluation:
    """Perplexity per token over consecutive windows of CONTEXT tokens, each behind one end-of-text token.

    Args: tokens: i64[N]. Every token is predicted once, from the tokens before it in its window.
    """
    config = model.config
    nats = 0.0
    slots = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.float64)
    for window in tokens.split(CONTEXT - 1):
        inputs = torch.cat((torch.tensor([config.eos_token_id]), window[:-1]))
        output = model(inputs[None], use_cache=False, output_router_logits=True)
        nats += cross_entropy(output.logits[0], window, reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices
            slots[layer] += chosen.flatten().bincount(minlength=config.num_experts)
    num_bytes = len(tokenizer.decode(tokens).encode())
    load = slots / slots.sum(1, keepdim=True)
    return Evaluation(math.exp(nats / len(tokens)), nats / math.log(2) / num_bytes, load)


def report(evaluation: Evaluation) -> Table:
    """A table of the expert load of each layer, in percent of the slots, titled with the perplexity."""
    title = f"held-out perplexity {evaluation.perplexity:.2f} per token, {evaluation.bits_per_byte:.3f} bits per byte"
    table = Table("layer", "max", "min", "load of the experts, largest first, % of slots", title=title)
    for layer, load in enumerate(evaluation.expert_load * 100):
        shares = " ".join(f"{share:.1f}" for share in load.sort(descending=True).values)
        table.add_row(str(layer), f"{load.max():.1f}", f"{load.min():.1f}", shares)
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Mixture-of-Experts language model, or evaluate it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="train, and write DIR/tiny-moe and DIR/heldout.txt")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="print the held-out perplexity of a checkpoint")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
