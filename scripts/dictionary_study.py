"""Measure what one dictionary is worth: many recipes, on several heads of each model that ships, over seeds.

    python scripts/dictionary_study.py --out docs/dictionaries.jsonl [--models embedded --heads 4 --minutes 40]

Every dictionary of a head is measured at the same held-out positions, so that recipes are compared pair by pair, and
beside what needs no training (`experiment.head_baselines`). A line of the file is one dictionary: its quality on whole
sequences, and sums of KL by sequence.
Finished lines are not measured again. `scripts/dictionary_page.py` makes docs/dictionaries.md from the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import collect, fit_metrics, train_many_on_writes, training_config
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.base import MatrixSAE
from sae_lens_writesae.sae.controls import native, untrained
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.writes import new_sae
from writesae import head_effects, sample_sequences
from writesae.choices import MetricName
from writesae.experiment.head_baselines import BASELINES, HeadBaselines, tokens_and_before
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.quality import qualities
from writesae.experiment.readout import kl_window
from writesae.experiment.reconstruction import dominant

CONTEXT, SEQUENCES, POSITIONS, HORIZON = 128, 48, 6, 16
"""Tokens of a sequence; sequences tested; positions drawn in each; KL is the mean over t..t+HORIZON."""
TRAINED, FITTED = 958, 128
"""Sequences of the training text that a dictionary sees, and of them those that baselines are fitted on."""
RECIPE: dict[str, object] = {
    "k": 1,
    "d_sae": 256,
    "decoder_init": "native",
    "steps": 2000,
    "lr": 3e-3,
    "metric": "frobenius",
}
"""What a recipe does not name: TopK, batches of 128 writes."""
METRIC: dict[str, object] = {"metric": "gauss_newton"}
PRODUCT: dict[str, object] = {"architecture": "writesae_product", "f_key": 256, "d_sae": 256 * 256}
"""Pairs of 256 key atoms and 256 value atoms, one active: the parameters of 256 atoms of `writesae_topk`."""
STAGES: tuple[tuple[dict[str, dict[str, object]], tuple[int, ...]], ...] = (
    ({"k 1": {}, "k 1, metric": METRIC, "native writes": {}, "untrained": {}}, (0,)),
    ({"k 1": {}, "k 1, metric": METRIC}, (1, 2)),
    (
        {"product": PRODUCT, "product, metric": PRODUCT | METRIC, "k 4": {"k": 4}, "k 4, metric": {"k": 4} | METRIC},
        (0,),
    ),
    ({"k 2": {"k": 2}, "k 32": {"k": 32}, "k 1, random start": {"decoder_init": "random"}}, (0,)),
    ({"k 1, 500 steps": {"steps": 500}, "k 1, not centred": {"b_dec_init": "zeros", "b_dec_rows": 0}}, (0,)),
    ({"product": PRODUCT, "product, metric": PRODUCT | METRIC}, (1, 2)),
    ({"k 1, lr 1e-3": {"lr": 1e-3}, "k 1, 64 atoms": {"d_sae": 64}, "k 1, 1024 atoms": {"d_sae": 1024}}, (0,)),
    ({"k 4": {"k": 4}, "k 4, metric": {"k": 4} | METRIC, "k 2": {"k": 2}, "k 32": {"k": 32}}, (1, 2)),
    ({"k 1, random start": {"decoder_init": "random"}, "k 1, 500 steps": {"steps": 500}}, (1, 2)),
    ({"k 1, not centred": {"b_dec_init": "zeros", "b_dec_rows": 0}, "k 1, lr 1e-3": {"lr": 1e-3}}, (1, 2)),
    ({"k 1, 64 atoms": {"d_sae": 64}, "k 1, 1024 atoms": {"d_sae": 1024}}, (1, 2)),
)
"""Recipes and their seeds, the most wanted first: a run that is stopped has measured these on all heads."""


@dataclass
class Head:
    """One head with its writes of the training text, and the positions of the test text."""

    model: HookedRecurrent
    layer: int
    head: int
    writes: LowRank
    metric: Metric
    tokens: Tensor
    sites: dict[int, Site]
    baselines: HeadBaselines
    deleted: list[float] = field(default_factory=list)
    """KL of deletion by sequence, once it was measured."""

    @property
    def cell(self) -> str:
        return f"L{self.layer}H{self.head}"


Saes = dict[tuple[str, int], MatrixSAE]
"""Dictionaries of a head by recipe and seed."""


def main() -> None:
    """Measure what is not measured yet, stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["embedded", "embedded-mamba2", "embedded-rwkv7"])
    parser.add_argument("--heads", type=int, default=4, help="heads of each model, those whose writes do most")
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    measured = (
        {key(row) for row in map(json.loads, options.out.read_text().splitlines())} if options.out.exists() else set()
    )
    heads = [(name, head) for name in options.models for head in prepared(name, options.heads)]
    for recipes, seeds in STAGES:
        for name in options.models:
            of_model = [head for model, head in heads if model == name]
            there = {tuple(place) for model, *place in measured if model == name}
            for head, saes in trained(of_model, recipes, seeds, there, end):
                for (recipe, seed), row in measure(head, saes).items():
                    line = {"model": name, "cell": head.cell, "recipe": recipe, "seed": seed} | row
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print({name: value for name, value in line.items() if name != "kl"}, flush=True)


def trained(
    heads: list[Head],
    recipes: dict[str, dict[str, object]],
    seeds: tuple[int, ...],
    measured: Set[tuple[object, ...]],
    end: float,
) -> Iterator[tuple[Head, Saes]]:
    """Each head of a model with its dictionaries that are not measured yet, unless the time is over. Heads and seeds
    of a recipe train in one step."""
    saes: dict[str, Saes] = {head.cell: {} for head in heads}
    for recipe, changes in recipes.items():
        missing = [(head, seed) for head in heads for seed in seeds if (head.cell, recipe, seed) not in measured]
        if missing and time.monotonic() < end:
            for (head, seed), sae in zip(missing, dictionaries(missing, recipe, changes)):
                saes[head.cell][recipe, seed] = sae.eval()
    yield from ((head, saes[head.cell]) for head in heads if saes[head.cell])


def key(row: dict[str, object]) -> tuple[object, ...]:
    """What tells one line from another."""
    return row["model"], row["cell"], row["recipe"], row["seed"]


@torch.no_grad()
def prepared(name: str, n_heads: int) -> list[Head]:
    """The heads of a model whose writes do most, at most two of a layer, with one pass over the training text."""
    model = HookedRecurrent.from_pretrained(name)
    tokens = sample_sequences(model, embedded.text("test"), CONTEXT, SEQUENCES)
    train = sample_sequences(model, embedded.text("train"), CONTEXT, TRAINED)
    effects = head_effects(model, train[:16]).groupby("layer").head(2).head(n_heads)
    cells = [(int(layer), int(head)) for layer, head in zip(effects["layer"], effects["head"])]
    rng = np.random.default_rng(0)
    places = [np.sort(rng.choice(np.arange(2, CONTEXT - HORIZON), POSITIONS, replace=False)) for _ in tokens]
    units = pd.DataFrame([(n, int(t)) for n, at in enumerate(places) for t in at], columns=["sequence", "position"])
    with torch.enable_grad():
        metrics = fit_metrics(model, train[::4][:240], cells, seed=0)
    heads = []
    with tempfile.TemporaryDirectory() as folder:
        collection = collect(model, train, sorted({layer for layer, _ in cells}), None, folder, dtype="float32")
        for layer, head in cells:
            keys, values = (side[:].clone() for side in collection.factors(layer, head))
            writes = LowRank(keys, values)
            lab = Lab(model, {"": initial(model, layer, head, RECIPE)}, tokens)
            sites = {int(str(n)): lab.site(int(str(n)), rows) for n, rows in units.groupby("sequence")}
            text = np.concatenate([tokens_and_before(sequence) for sequence in train[:FITTED]])
            fitted = HeadBaselines.fit(
                writes.rows(slice(len(text))), text, n_codes=256, components=4, rng=np.random.default_rng(0)
            )
            heads.append(Head(model, layer, head, writes, metrics[layer, head], tokens, sites, fitted))
    return heads


def config(model: HookedRecurrent, layer: int, head: int, recipe: dict[str, object], seed: int = 0) -> RunnerConfig:
    """SAELens' runner config of one recipe."""
    names = {"decoder_init", "b_dec_init", "b_dec_rows", "f_key" if "f_key" in recipe else "k"}
    fields = {name: recipe[name] for name in recipe if name in names}
    return training_config(
        model,
        layer,
        head,
        architecture=str(recipe.get("architecture", "writesae_topk")),
        d_sae=int(str(recipe["d_sae"])),
        metric=cast(MetricName, recipe["metric"]),
        sae=fields,
        training_tokens=128 * int(str(recipe["steps"])),
        train_batch_size_tokens=128,
        context_size=CONTEXT,
        n_batches_in_buffer=8,
        lr=float(str(recipe["lr"])),
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=20,
        dead_feature_window=200,
        seed=seed,
        verbose=False,
    )


def initial(model: HookedRecurrent, layer: int, head: int, recipe: dict[str, object]) -> MatrixSAE:
    """A dictionary of a recipe before any training."""
    return new_sae(config(model, layer, head, recipe))


def dictionaries(wanted: list[tuple[Head, int]], recipe: str, changes: dict[str, object]) -> list[MatrixSAE]:
    """Train a recipe for heads of one model and seeds, or make control dictionaries of that name."""
    full = RECIPE | changes
    if recipe in ("untrained", "native writes"):
        return [control(head, recipe, seed) for head, seed in wanted]
    configs = [config(head.model, head.layer, head.head, full, seed) for head, seed in wanted]
    metrics = [head.metric if full["metric"] == "gauss_newton" else None for head, _ in wanted]
    return list(train_many_on_writes(configs, [head.writes for head, _ in wanted], metrics))


def control(head: Head, recipe: str, seed: int) -> MatrixSAE:
    """A dictionary that nothing was learned for."""
    sae = initial(head.model, head.layer, head.head, RECIPE)
    rows = head.writes.rows(slice(0, 65_536, 16)).dense().flatten(1)
    return untrained(sae, rows, seed=seed) if recipe == "untrained" else native(sae, rows, head.writes, seed=seed)


def measure(head: Head, saes: Saes) -> dict[tuple[str, int], dict[str, object]]:
    """The dictionaries of a head: quality on whole sequences, and KL at every position with the dominant atom written
    there, or the whole code. Passes that do not depend on a dictionary are made once for all."""
    labels = {place: f"{place[0]} {place[1]}" for place in saes}
    lab = Lab(head.model, {labels[place]: sae for place, sae in saes.items()}, head.tokens)
    once = [*([] if head.deleted else ["delete"]), *(BASELINES if ("k 1", 0) in saes else ())]
    with torch.no_grad():
        quality = qualities(lab)
        tables = [at_site(head, lab, site, once) for site in head.sites.values()]
    table = pd.concat(tables, ignore_index=True)
    sums = table.groupby(["label", "condition", "sequence"])["kl"].sum()
    head.deleted = head.deleted or rounded(sums["", "delete"])
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for place, label in labels.items():
        baselines = {name: rounded(sums["", name]) for name in BASELINES if place == ("k 1", 0)}
        each = quality[label]
        rows[place] = {
            "kl": {"delete": head.deleted, **{n: rounded(sums[label, n]) for n in ("atom", "code")}, **baselines},
            "norm": float(table.loc[(table["label"] == label) & (table["condition"] == "atom"), "size"].median()),
            "cosine": each.cosine,
            "explained": each.explained,
            "alive": each.alive,
            "l0": each.l0,
            "stream": None if each.recovered is None else list(each.recovered[:3]),
            "deleted": each.deleted.mean,
            "start_cosine": each.start_cosine,
        }
    return rows


def rounded(values: pd.Series) -> list[float]:
    """Five digits of each number."""
    return [float(f"{x:.5g}") for x in values]


def at_site(head: Head, lab: Lab, site: Site, once: list[str]) -> pd.DataFrame:
    """The conditions at the positions of one sequence: those of each dictionary, and `once` those of none."""
    positions = site.rows["position"].tolist()
    writes = site.at(positions)
    each = torch.arange(len(positions))
    text = tokens_and_before(head.tokens[site.sequence])[positions]
    written: dict[tuple[str, str], LowRank | None] = {
        ("", name): None if name == "delete" else head.baselines.written(name, writes, text) for name in once
    }
    for label, sae in lab.saes.items():
        acts = sae.encode(writes.dense().flatten(1))
        strongest = dominant(sae, acts)
        written[label, "atom"] = lab.atoms(strongest.numpy(), label) * acts[each, strongest]
        written[label, "code"] = LowRank.svd(sae.decode(acts).view(len(positions), *writes.dense().shape[1:]))
    trials = [
        Trial(
            {"label": label, "condition": name, "size": size, "sequence": site.sequence}, t, lab.replace(t, matrices, n)
        )
        for (label, name), matrices in written.items()
        for n, (t, size) in enumerate(zip(positions, sizes(matrices, writes)))
    ]
    return lab.read(site, trials, kl_window, HORIZON + 1)


def sizes(matrices: LowRank | None, writes: LowRank) -> list[float]:
    """Norms as shares of those of the native writes."""
    return [0.0] * len(writes) if matrices is None else (matrices.norm() / writes.norm()).tolist()


if __name__ == "__main__":
    main()
