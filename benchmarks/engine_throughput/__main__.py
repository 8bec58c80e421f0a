"""Tokens per second through Leeway's server beside the same vLLM called directly, top-20 log-probs on.

    python -m benchmarks.engine_throughput

One vLLM in its own environment (`make engine-env ENGINE=vllm`) answers the same requests in turn: called directly in
its process (AsyncLLM.generate with the parameters that the server uses), and through the InferenceService from this
process, which decodes every chunk. Rounds alternate, a warm-up round of each is left out, and the ratio is that of the
medians. On a machine whose cores are all vLLM's, the client's CPU time is taken from vLLM; it is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.engine_throughput.requests import PROMPT_TOKENS, TOPK, VOCABULARY, Round, tokens_per_second
from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.remote import RemoteEngine
from leeway.huggingface import save_model
from leeway.rpc import Security
from leeway.service.ports import free_port

PROMISE = 0.9
CHECKOUT = Path(__file__).parents[2]


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="sampled by each request")
    parser.add_argument("--hidden", type=int, default=384, help="size of the dense model, of 6 layers")
    arguments = parser.parse_args()
    command = [sys.executable, str(CHECKOUT / "deploy" / "engines" / "build"), "vllm", "--if-built"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        print(f"skipped: {built.stderr.strip()}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), arguments.hidden)
        return asyncio.run(measure(built.stdout.strip(), model, arguments))


def make_model(folder: Path, hidden: int) -> Path:
    """A random dense model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=6,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    )
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(folder)
    save_model(model, folder, folder, "float32")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {size / 1e6:.0f} M parameters, float32, vocabulary {VOCABULARY}")
    return folder


async def measure(python: str, model: Path, arguments: argparse.Namespace) -> int:
    """Both sides in turn."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    command = ["-m", "benchmarks.engine_throughput.server", "--model", str(model), "--address", address]
    with (CHECKOUT / "build" / "engine_throughput.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            python, *command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert server.stdin is not None
    assert server.stdout is not None
    lines = server.stdout

    async def ask(question: str = "") -> float | str:
        """The server's next answer; vLLM prints lines of its own."""
        assert server.stdin is not None
        if question:
            server.stdin.write(f"{question}\n".encode())
        while line := await lines.readline():
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise SystemExit("the server has ended; see build/engine_throughput.log")

    await ask()
    remote = await RemoteEngine.connect(address, Security())
    try:
        kept = [await compare(concurrency, arguments, ask, remote) for concurrency in arguments.concurrency]
    finally:
        await remote.aclose()
        server.stdin.close()
        await server.wait()
    return 0 if all(kept) else 1


async def compare(
    concurrency: int,
    arguments: argparse.Namespace,
    ask: Callable[[str], Awaitable[float | str]],
    remote: RemoteEngine,
) -> bool:
    """One concurrency; whether the promise is kept."""

    async def through_grpc(request: GenerationRequest) -> int:
        async with aclosing(remote.generate(request)) as events:
            async for event in events:
                if isinstance(event, GenerationEnd):
                    return event.num_tokens
        raise AssertionError

    rates: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    client: list[float] = []
    sides = ["direct", "gRPC"]
    for repetition in range(-1, arguments.repetitions):
        # Each side is the first in turn.
        for side in sides if repetition % 2 else sides[::-1]:
            number = 1000 * concurrency + 10 * (repetition + 1) + sides.index(side)
            what = Round(number, concurrency, 2 * concurrency, arguments.tokens)
            before, own = float(await ask("cpu")), time.process_time()
            if side == "direct":
                rate = float(await ask(json.dumps({name: getattr(what, name) for name in what.__slots__})))
            else:
                rate = await tokens_per_second(what, through_grpc)
            if repetition >= 0:
                num_tokens = what.requests * what.tokens
                rates[side].append(rate)
                cpu[side].append((float(await ask("cpu")) - before) / num_tokens * 1e6)
                if side == "gRPC":
                    client.append((time.process_time() - own) / num_tokens * 1e6)
    direct, through = (statistics.median(rates[side]) for side in sides)
    ratio = through / direct
    kept = ratio >= PROMISE
    print(
        f"{concurrency:>3} at a time, {PROMPT_TOKENS}+{arguments.tokens} tokens, top-{TOPK}: direct {direct:.0f}/s, "
        f"through gRPC {through:.0f}/s: {ratio:.3f} of it; at least {PROMISE} is promised: "
        f"{'kept' if kept else 'NOT kept'}"
    )
    microseconds = [statistics.median(each) for each in (cpu["direct"], cpu["gRPC"], client)]
    print(
        "    CPU time per token: direct {:.0f} us, server {:.0f} us and client {:.0f} us".format(*microseconds),
        flush=True,
    )
    return kept


if __name__ == "__main__":
    sys.exit(main())
