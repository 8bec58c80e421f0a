"""Make the model that sortmix8 starts from: a tokenizer, a small Qwen3 (MoE or dense) and its supervised warm-up.

    python -m examples.sortmix8.warmup --arch moe --output examples/sortmix8/model-moe

Each demonstration is answered by one of three conventions: 30% ascending, 40% descending, 30% copies. The loss is on
the answer only. Weights are saved in bfloat16; the printed accuracy is that of the saved weights, sampled at
temperature 1 on held-out tasks.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from examples.sortmix8.task import NUM_LETTERS, reward, tasks
from leeway.huggingface import load_model, save_model

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = string.ascii_lowercase + string.digits + " >,.:;!?+-*/=<()[]{}|_#@&"
VOCABULARY = (PAD, EOS, UNKNOWN, *CHARACTERS)  # 64 entries
PAD_ID, EOS_ID = 0, 1
CONTEXT_LENGTH = 64
NUM_NEW_TOKENS = NUM_LETTERS + 1  # the letters and the end of sequence
ASCENDING, DESCENDING = 0.3, 0.4  # shares of the demonstrations; the rest are copies


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 64 in all."""
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(arch: str) -> PreTrainedModel:
    """A fresh model: 541k parameters as `moe` (8 experts, 2 per token), 317k as `dense`."""
    shared: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 256,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
    }
    if arch == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**shared))
    experts: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **experts))


def answer(letters: str, draw: random.Random) -> str:
    """One demonstration's answer, by a convention drawn for it."""
    convention = draw.random()
    if convention < ASCENDING:
        return "".join(sorted(letters))
    if convention < ASCENDING + DESCENDING:
        return "".join(sorted(letters, reverse=True))
    return letters


def demonstrations(count: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids [count, 18] of prompt, answer and end of sequence, from training tasks."""
    draw = random.Random(seed)
    texts = [task["prompt"] + answer(task["letters"], draw) + EOS for task in tasks("train", count, seed)]
    return torch.tensor(tokenizer(texts)["input_ids"])


def train(model: PreTrainedModel, token_ids: torch.Tensor, batch_size: int, learning_rate: float) -> None:
    """One pass over the demonstrations; the rate rises over the first twentieth of the steps, then stays."""
    batches: Sequence[torch.Tensor] = torch.split(token_ids, batch_size)  # pyright: ignore[reportUnknownVariableType]
    num_rising = max(1, len(batches) // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / num_rising))
    model.train()
    for step, batch in enumerate(batches, start=1):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits[:, -NUM_NEW_TOKENS:]  # [B, 9, V]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, -NUM_NEW_TOKENS:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)  # noqa: T201 - a script


@torch.no_grad()
def heldout_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> float:
    """Share of `count` held-out tasks answered right, sampled at temperature 1, one draw each."""
    heldout = tasks("heldout", count, seed)
    token_ids = torch.tensor(tokenizer([task["prompt"] for task in heldout])["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for _ in range(NUM_NEW_TOKENS):
        probabilities = model(input_ids=token_ids, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(dim=-1)
        token_ids = torch.cat([token_ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    ended = token_ids[:, -1] == EOS_ID
    texts = tokenizer.batch_decode(token_ids[:, -NUM_NEW_TOKENS:-1])
    rewards = [reward(task, text) if end else 0.0 for task, text, end in zip(heldout, texts, ended, strict=True)]
    return sum(rewards) / count


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Warm up the sortmix8 model.")
    parser.add_argument("--arch", choices=("moe", "dense"), default="moe", help="Qwen3-MoE or its dense sibling")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="demonstrations per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the demonstrations")
    parser.add_argument("--heldout", type=int, default=4096, help="held-out tasks to measure on")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    started = time.monotonic()
    tokenizer, model = make_tokenizer(), make_model(options.arch)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    token_ids = demonstrations(options.steps * options.batch_size, options.seed, tokenizer)
    train(model, token_ids, options.batch_size, options.learning_rate)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        save_model(model, Path(directory), options.output, "bfloat16")
    saved = load_model(options.output, torch.float32)
    accuracy = heldout_accuracy(saved, tokenizer, options.heldout, options.seed)
    seconds = time.monotonic() - started
    summary = f"{num_parameters} parameters, held-out accuracy at T=1 {accuracy:.3f}, {seconds:.0f} s"
    print(f"{options.output}: {summary}")  # noqa: T201 - a script


if __name__ == "__main__":
    main()
