"""The main job, end to end, on a model that ships with the package: train on writes and on states, then test both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_lens_writesae.choices import Target

if TYPE_CHECKING:
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from sae_lens_writesae.page.report import ReportFiles
    from sae_lens_writesae.sae.training import MatrixTrainingSAE


class HeadChoice(NamedTuple):
    """A head and how long it remembers."""

    layer: int
    head: int
    half_life: float
    """Median over writes of the tokens after which half of a write's norm is left, by decay and erase."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train two sparse autoencoders on one head with memory, one on its writes and one on its states, with SAELens' own
    runner. Then, where an atom fires, exchange the model's own write for the atom and for controls, and measure how the
    next-token distribution changes. The report puts both dictionaries side by side. Offline, on a CPU, in minutes."""

    model: str = "embedded"
    """Model to look into: one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7), a folder, or a
    name on the hub."""
    layer: int | None = None
    """Recurrent layer. By default the head is taken whose writes last nearest to `memory` tokens."""
    head: int | None = None
    """Head of that layer."""
    memory: float = 32.0
    """Wanted half-life of a write, in tokens, where no head is named."""
    targets: tuple[Target, ...] = ("write", "state")
    """What dictionaries are trained on."""
    d_sae: int = 512
    """Atoms of a dictionary."""
    k: int = 32
    """Active atoms per token."""
    training_tokens: int = 150_000
    """Tokens that each dictionary is trained on."""
    context_size: int = 128
    """Tokens per sequence."""
    eval_sequences: int = 64
    """Sequences of the test."""
    n_atoms: int = 60
    """Atoms that are tested."""
    firings_per_atom: int = 5
    """Firings of each."""
    last_position_firings: int = 30
    """Firings that are followed to the end of their sequence; these cost several times the others."""
    seed: int = 0
    """Seed of training, draws and controls."""
    out: Path = Path("writesae-out")
    """Folder for report.html, the dictionaries and the results."""

    def run(self, say: Callable[[str], object] = print) -> ReportFiles:
        """Train one dictionary per target, test each, and write everything to `out`: the report, and per target the
        dictionary (`sae/`) and its result (`substitution/`)."""
        from hookpoints import HookedRecurrent, embedded
        from sae_lens_writesae.evaluations.substitution import Substitution
        from sae_lens_writesae.experiment.tokens import sample_sequences
        from sae_lens_writesae.page.report import write_report
        from sae_lens_writesae.sae.load import load_sae

        model = HookedRecurrent.from_pretrained(self.model)
        tokens = sample_sequences(model, embedded.text("test"), self.context_size, self.eval_sequences)
        choice = self.choose_head(model, tokens[:8])
        rule = model.cfg.layer(choice.layer).rule
        say(
            f"model {self.model!r}: head {choice.head} of layer {choice.layer} ({rule}), half-life of a write "
            f"{choice.half_life:.0f} tokens"
        )
        results = []
        for target in self.targets:
            say(f"\ntraining a WriteSAE on the {target}s of this head (SAELens)")
            folder = self.out / target
            sae = self._train(model, choice, target)
            sae.save_inference_model(folder / "sae")
            say("substitution test: its atoms in the place of the model's own writes")
            test = Substitution(
                n_atoms=self.n_atoms,
                firings_per_atom=self.firings_per_atom,
                last_position_firings=self.last_position_firings,
                seed=self.seed,
                label=f"{target}-trained",
            )
            result = test.run(model, load_sae(folder / "sae"), tokens)
            result.save(folder / "substitution")
            for claim in result.claims():
                say(f"{result.label}: {claim.claim}: {claim.measured}: {claim.outcome}. {claim.sentence}")
            results.append(result)
        return write_report(results, self.out / "report.html")

    def choose_head(self, model: HookedRecurrent, tokens: Tensor) -> HeadChoice:
        """The head that was named, or the one whose half-life is nearest to `memory` (in octaves)."""
        import torch

        from sae_lens_writesae.experiment.head import half_lives

        layers = model.cfg.recurrent_layers if self.layer is None else [self.layer]
        choices: list[HeadChoice] = []
        for layer in layers:
            heads = range(model.cfg.layer(layer).H)
            with torch.no_grad():
                whole = model.recurrence(tokens, layer)
                for head in heads if self.head is None else [h for h in heads if h == self.head]:
                    rows = (whole.select(rows=row, heads=head) for row in range(len(tokens)))
                    lives = torch.cat([half_lives(row) for row in rows])
                    choices.append(HeadChoice(layer, head, float(lives.median())))
        if not choices:
            n_heads = model.cfg.layer(layers[0]).H
            raise ValueError(f"head {self.head} is out of range: layer {layers[0]} has heads 0 to {n_heads - 1}")
        wanted = torch.tensor(self.memory).log2()
        return min(choices, key=lambda choice: float((torch.tensor(choice.half_life).log2() - wanted).abs()))

    def _train(self, model: HookedRecurrent, choice: HeadChoice, target: Target) -> MatrixTrainingSAE:
        from hookpoints import embedded
        from sae_lens_writesae.sae.runner import quiet, text_dataset, train, training_config

        cfg = training_config(
            model,
            choice.layer,
            choice.head,
            target=target,
            d_sae=self.d_sae,
            sae={"k": self.k, "normalize_activations": "expected_average_only_in"},
            training_tokens=self.training_tokens,
            context_size=self.context_size,
            store_batch_size_prompts=16,
            n_batches_in_buffer=32,
            train_batch_size_tokens=512,
            n_batches_for_norm_estimate=8,
            lr=1e-3,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=20,
            dead_feature_window=100,
            seed=self.seed,
            verbose=False,
        )
        with quiet():
            return train(cfg, model, text_dataset(embedded.text("train")))
