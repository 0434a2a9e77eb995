"""The main job, end to end, on the model that ships with the package: train on writes and on states, then test both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.evaluate import spread
from sae_lens_writesae.head_memory import half_lives
from sae_lens_writesae.report import ReportFiles, write_report
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.runner import quiet, text_dataset, train, training_config
from sae_lens_writesae.sae.target import Target
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import AtomChoice, SubstitutionConfig
from sae_lens_writesae.substitution_result import SubstitutionResult


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults fit two CPU cores and five minutes."""

    model: str = "embedded"
    layer: int | None = None
    """Recurrent layer; None: the head whose writes last nearest to ``memory`` tokens is taken."""
    head: int | None = None
    memory: float = 32.0
    """Wanted half-life of a write, in tokens, where the head is not named."""
    targets: tuple[Target, ...] = ("write", "state")
    d_sae: int = 512
    k: int = 32
    training_tokens: int = 150_000
    context_size: int = 128
    eval_sequences: int = 64
    n_atoms: int = 60
    firings_per_atom: int = 5
    last_position_firings: int = 30
    """Firings that are followed to the end of their sequence; these cost several times the others."""
    seed: int = 0


class HeadChoice(NamedTuple):
    """A head and how long it remembers."""

    layer: int
    head: int
    half_life: float
    """Median over writes of the tokens after which half of a write's norm is left (decay and erase)."""


class DemoResult(NamedTuple):
    """What the demo leaves behind."""

    results: list[SubstitutionResult]
    report: ReportFiles
    folder: Path


def run_demo(config: DemoConfig, out: Path, say: Any = print) -> DemoResult:
    """Train one SAE per target on one head, run the substitution test on each, write everything to ``out``.

    Leaves ``report.html``, ``report.json``, and per target the SAE (``sae/``) and the tidy tables of the test: of the
    dominant atom of each position (``substitution``, the headline), and of each firing's own (``substitution_own``).
    """
    torch.manual_seed(config.seed)
    model = HookedRecurrent.from_pretrained(config.model)
    tokens = spread(model, embedded.text("test"), config.context_size, config.eval_sequences)
    chosen = choose_head(model, tokens[:8], config)
    say(
        f"model {config.model!r}: head {chosen.head} of layer {chosen.layer} "
        f"({model.cfg.layer(chosen.layer).rule}), half-life of a write {chosen.half_life:.0f} tokens"
    )
    dataset = text_dataset(embedded.text("train"))
    results = []
    for target in config.targets:
        say(f"\ntraining a WriteSAE on the {target}s of this head (SAELens)")
        sae = _train(config, model, chosen, target, dataset)
        sae.save_inference_model(str(out / target / "sae"))
        say("substitution test: its atoms in the place of the model's own writes")
        tests: tuple[tuple[AtomChoice, str], ...] = (("dominant", "substitution"), ("own", "substitution_own"))
        for choice, file in tests:
            test = SubstitutionConfig(
                n_atoms=config.n_atoms,
                firings_per_atom=config.firings_per_atom,
                atom_choice=choice,
                last_position_firings=config.last_position_firings,
                seed=config.seed,
                label=f"{target}-trained" + (" (own atom)" if choice == "own" else ""),
            )
            result = run_substitution(model, load_sae(out / target / "sae"), tokens, test)
            result.save(out / target / file)
            results.append(result)
    report = write_report(results, out / "report.html")
    return DemoResult(results, report, out)


def choose_head(model: HookedRecurrent, tokens: Tensor, config: DemoConfig) -> HeadChoice:
    """The head that the config names, or the one whose half-life is nearest to ``config.memory`` (in octaves)."""
    layers = model.cfg.recurrent_layers if config.layer is None else [config.layer]
    found: list[HeadChoice] = []
    for layer in layers:
        heads = range(model.cfg.layer(layer).H)
        with torch.no_grad():
            whole = model.recurrence(tokens, layer)
            for head in heads:
                rows = (whole.select(rows=row, heads=head) for row in range(len(tokens)))
                lives = torch.cat([half_lives(row) for row in rows])
                found.append(HeadChoice(layer, head, float(lives.median())))
    if config.head is not None:
        found = [choice for choice in found if choice.head == config.head]
    if not found:
        raise ValueError(
            f"head {config.head} is out of range: layer {layers[0]} has heads 0 to {model.cfg.layer(layers[0]).H - 1}"
        )
    wanted = torch.tensor(config.memory).log2()
    return min(found, key=lambda choice: float((torch.tensor(choice.half_life).log2() - wanted).abs()))


def _train(config: DemoConfig, model: HookedRecurrent, chosen: HeadChoice, target: Target, dataset: Any) -> Any:
    cfg = training_config(
        model,
        chosen.layer,
        chosen.head,
        target=target,
        d_sae=config.d_sae,
        sae={"k": config.k, "normalize_activations": "expected_average_only_in"},
        training_tokens=config.training_tokens,
        context_size=config.context_size,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        train_batch_size_tokens=512,
        n_batches_for_norm_estimate=8,
        lr=1e-3,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=20,
        dead_feature_window=100,
        seed=config.seed,
        verbose=False,
    )
    with quiet():
        return train(cfg, model, dataset)
