"""Evaluate dictionaries of several heads of the models that ship, for docs/results.md.

    python scripts/results_run.py runs/results --models embedded embedded-mamba2 embedded-rwkv7 --heads 3
    python scripts/results_page.py runs/results

Of each head: dictionaries of writes with k 1 (three seeds), 2, 4 and 32, one in the model's metric, and one of states.
Substitution tests all of them, comparisons take what they compare, and every other evaluation the first one. A head
that is finished is passed over.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import collect, fit_metrics, load_sae, train, train_on_writes
from sae_lens_writesae import training_config as config_of
from sae_lens_writesae.sae.collection import Collection
from sae_lens_writesae.sae.runner import quiet
from writesae import head_effects, sample_sequences
from writesae.evaluations import EVALUATIONS
from writesae.experiment.evaluation import Scope
from writesae.experiment.suite import quality_of_heads, with_quality

CONTEXT, TOKENS = 128, 256_000
SMALL: dict[str, object] = {"n_atoms": 30, "firings_per_atom": 4, "last_position_firings": 0, "n_sequences": 24}
"""Settings of evaluations that have them."""
SUBSTITUTION: dict[str, object] = {"scales": ("coefficient", "matched"), "atom_choice": ("dominant",)}


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["embedded", "embedded-mamba2", "embedded-rwkv7"])
    parser.add_argument("--heads", type=int, default=3)
    options = parser.parse_args()
    for name in options.models:
        model = HookedRecurrent.from_pretrained(name)
        text = sample_sequences(model, embedded.text("train"), CONTEXT, 900)
        tokens = sample_sequences(model, embedded.text("test"), CONTEXT, 48)
        effects = head_effects(model, text[:16]).groupby("layer").head(1).head(options.heads)
        for layer, head in zip(effects["layer"].astype(int), effects["head"].astype(int)):
            folder = options.out / name / f"L{layer}H{head}"
            if not (folder / "done").exists():
                one_head(model, text, tokens, int(layer), int(head), folder)
                (folder / "done").touch()


def one_head(model: HookedRecurrent, text: Tensor, tokens: Tensor, layer: int, head: int, folder: Path) -> None:
    """All dictionaries and evaluations of a head."""
    collection = collect(model, text, [layer], [head], folder / "collection", targets=("write", "state"))
    saes = dictionaries(model, collection, text, layer, head, folder)
    cell = f"L{layer}H{head}"
    first = f"{cell} write k 1"
    quality = quality_of_heads(model, saes, tokens)
    for kind, evaluation in EVALUATIONS.items():
        names = {
            Scope.SEEDS: [first, f"{cell} write k 1 seed 1"],
            Scope.TARGETS: [first, f"{cell} state k 1"],
            Scope.VARIANTS: [first, f"{cell} write k 1 FlatSAE"],
        }.get(evaluation.scope, [first])
        own = {f.name for f in fields(evaluation)}
        settings = SMALL | (SUBSTITUTION if kind == "substitution" else {})
        for group in ([name] for name in saes) if kind == "substitution" else [names]:
            label = group[0] if len(group) == 1 and evaluation.scope is not Scope.HEAD else cell
            made = evaluation.from_dict({n: v for n, v in settings.items() if n in own} | {"label": label})
            result = made.run_or_skip(model, {n: saes[n] for n in group}, tokens, reference=text[:128], progress=False)
            with_quality(result, quality, group).save(folder / "results" / kind / label.replace(" ", "-"))
            print(model.cfg.model_name, label, kind, result.skipped or result.pace, flush=True)


def dictionaries(
    model: HookedRecurrent, collection: Collection, text: Tensor, layer: int, head: int, folder: Path
) -> dict[str, SAE]:
    """The dictionaries of a head by label, trained where they are not there yet."""
    recipes: dict[str, dict[str, object]] = {
        "write k 1": {},
        "write k 1 seed 1": {"seed": 1},
        "write k 1 seed 2": {"seed": 2},
        "write k 1 metric": {"metric": "gauss_newton"},
        "write k 2": {"k": 2},
        "write k 4": {"k": 4},
        "write k 32": {"k": 32},
        "state k 1": {"target": "state"},
        "write k 1 FlatSAE": {"encoder": "dense", "decoder": "flat"},
    }
    saes: dict[str, SAE] = {}
    for label, recipe in recipes.items():
        where = folder / "saes" / label.replace(" ", "-")
        if not where.exists():
            saved(model, collection, text, layer, head, dict(recipe), where)
        saes[f"L{layer}H{head} {label}"] = load_sae(where)
    return saes


def saved(
    model: HookedRecurrent,
    collection: Collection,
    text: Tensor,
    layer: int,
    head: int,
    recipe: dict[str, object],
    where: Path,
) -> None:
    """Train one dictionary and save it."""
    target, metric_name = recipe.pop("target", "write"), recipe.pop("metric", "frobenius")
    seed = int(str(recipe.pop("seed", 0)))
    sizes = {"d_sae": 256, "training_tokens": TOKENS, "context_size": CONTEXT, "seed": seed, "verbose": False}
    cfg = config_of(collection, layer, head, target=target, metric=metric_name, sae=recipe, **sizes)  # pyright: ignore
    with quiet():
        if target == "state":
            sae = train(cfg)
        else:
            keys, values = (side[:] for side in collection.factors(layer, head))
            place = (layer, head)
            metric = fit_metrics(model, text[::4], [place])[place] if metric_name == "gauss_newton" else None
            sae = train_on_writes(cfg, keys, values, metric=metric)
    sae.save_inference_model(where)


if __name__ == "__main__":
    main()
