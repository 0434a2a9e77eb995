"""What hooks cost: a hooked forward with nobody listening, with one head's writes kept, and with patterns, against the
plain HF model. Then what collecting the factors of every head costs, in time and on disk, and what it costs to get rows
of one head back.

Run ``python benchmarks/hooks.py``; timings are interleaved in one process and the median ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.factors import collect

HEAD = "blocks.1.mixer.heads.1."


def qwen(layers: int, width: int, heads: int, dim: int) -> torch.nn.Module:
    """A random Qwen3.5-shaped model."""
    config = transformers.Qwen3_5TextConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=dim,
        linear_value_head_dim=dim,
    )
    torch.manual_seed(0)
    return transformers.Qwen3_5ForCausalLM(config).eval()


def ratios(plain: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time all in turn, ``rounds`` times; each round gives one ratio to plain."""
    found: dict[str, list[float]] = {name: [] for name in others}
    for function in (plain, *others.values()):
        function()
    for _ in range(rounds):
        base = _seconds(plain)
        for name, function in others.items():
            found[name].append(_seconds(function) / base)
    return found


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def collecting(hf: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> dict[str, float]:
    """Bytes per token and head, and times against a plain forward of the same tokens [B,T]: collecting all heads of all
    recurrent layers, and rebuilding one head's rows [B*T,K*V] from the files."""
    model = HookedRecurrent.from_hf(hf)
    layers, heads = model.cfg.recurrent_layers, model.cfg.n_heads
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        numbers = iter(range(10**6))

        def gather(target: str) -> object:
            return collect(model, tokens, layers, None, f"{folder}/{next(numbers)}", targets=(target,), dtype="float16")

        kept = {target: gather(target) for target in ("write", "state")}
        parts = {
            "collect writes": lambda: gather("write"),
            "collect for states": lambda: gather("state"),
            "rows of writes, one head": lambda: kept["write"].rows(layers[0], 0, "write"),
            "rows of states, one head": lambda: kept["state"].rows(layers[0], 0, "state"),
        }
        found = ratios(lambda: hf(tokens, use_cache=False), parts, rounds)
        per = tokens.numel() * heads * len(layers)
        sizes = {f"bytes per token and head, {target}s": kept[target].total_bytes / per for target in kept}
    return {name: statistics.median(values) for name, values in found.items()} | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for hooks.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows = {}
    cases = [("4 layers, 4 heads 32x32", qwen(4, 160, 4, 32)), ("4 layers, 16 heads 128x128", qwen(4, 512, 16, 128))]
    for label, hf in cases:
        tokens = torch.randint(0, 4096, (1, options.tokens))
        plain_model = qwen(4, hf.config.hidden_size, hf.config.linear_num_value_heads, hf.config.linear_key_head_dim)
        model = HookedRecurrent.from_hf(hf)
        with torch.no_grad():
            rows[label] = ratios(
                lambda plain_model=plain_model, tokens=tokens: plain_model(tokens, use_cache=False),
                {
                    "nobody listens": lambda model=model, tokens=tokens: model(tokens),
                    "all vector hooks kept": lambda model=model, tokens=tokens: model.run_with_cache(tokens),
                    "one head's writes kept": lambda model=model, tokens=tokens: model.run_with_cache(
                        tokens, names_filter=HEAD + "hook_write_vec"
                    ),
                    "one head's states kept": lambda model=model, tokens=tokens: model.run_with_cache(
                        tokens, names_filter=HEAD + "hook_state_vec"
                    ),
                    "one layer's pattern kept": lambda model=model, tokens=tokens: model.run_with_cache(
                        tokens, names_filter="blocks.1.mixer.hook_pattern"
                    ),
                    "all patterns kept": lambda model=model, tokens=tokens: model.run_with_cache(
                        tokens, names_filter=lambda name: name.endswith("hook_pattern")
                    ),
                },
                options.rounds,
            )
    medians = {label: {name: statistics.median(values) for name, values in row.items()} for label, row in rows.items()}
    print(f"time / plain Hugging Face forward, T = {options.tokens}, median of {options.rounds}, CPU")
    for label, row in medians.items():
        print(f"\n{label}")
        for name, value in row.items():
            print(f"  {name:28s} {value:6.3f}")
    medians["collecting"] = collecting(
        cases[1][1], torch.randint(0, 4096, (4, options.tokens)), max(3, options.rounds // 3)
    )
    print(f"\ncollecting, 16 heads 128x128 in 3 layers, 4 x {options.tokens} tokens: time / plain forward; bytes")
    for name, value in medians["collecting"].items():
        print(f"  {name:36s} {value:8.3f}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "hooks.json").write_text(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
