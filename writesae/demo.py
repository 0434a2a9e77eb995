"""The main job, end to end, on models that ship with the package: a fact that one atom writes, then dictionaries of a
language model's writes and states, tested."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from writesae.choices import MetricName, at_least
from writesae.dictionaries import quality_table, quiet, save_dictionary
from writesae.files import check_ours, check_settings, check_writable, keep_settings, taken

if TYPE_CHECKING:
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from sae_lens_writesae.sae.factors import Collection
    from sae_lens_writesae.sae.training import MatrixTrainingSAE
    from writesae.experiment.conditions import Control
    from writesae.experiment.evaluation import Result
    from writesae.experiment.terms import Terms
    from writesae.page.report import Opening


RECIPES: dict[str, MetricName] = {"write-trained": "frobenius", "write-trained, metric": "gauss_newton"}
"""The dictionaries, and what errors are measured by: their squares, or the KL divergence that they cause."""
FACTS = "facts.json"
SHOWN_METHODS = {
    "writesae_product": "an atom",
    "product quantizer (k-means of k and of u)": "codes of two quantizers",
    "null: another pair's write": "another pair's write",
    "null: untrained writesae_product": "an untrained atom",
}
"""What replaces a write that holds a fact: a row of `writesae zoo`, and its name."""
SHOWN_CONTROLS: tuple[Control, ...] = ("random", "shuffled", "pair_mean", "drawn", "quantised", "pca")
"""What is written instead of an atom: directions, and the baselines that recover most."""
DEMO_PASSES = 4400
"""What the demo takes, in the time that a pass over a sequence does."""
RIVAL_SENTENCE = "Additive quantizers, which take longer to fit, write as many (`writesae zoo`)."
"""What the panels leave out: see docs/zoo_board.md."""
SENTENCES = {
    "recall": "One atom writes a fact into the memory, and the model recalls it",
    "composition": "One atom changes one attribute of a fact, and the others stay",
}
"""Model of the zoo -> what is shown on it."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Write facts into a memory by atoms; then read what one head of a language model writes, train dictionaries on it,
    and replace the model's own writes by their atoms.

    Facts are written in two small models whose mechanism is known, by atoms and by controls. The head of the language
    model is the one whose writes do most, of those that remember for a while. Two dictionaries of its writes: one for
    squared errors, one for errors in the model's own metric. At positions drawn uniformly, the model's own write is
    replaced by the strongest atom and by what needs no training, and the report says how much of the write's effect
    each recovers.
    Offline, in about a minute on two cores."""

    model: str = "embedded"
    """Model to look into: one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7), a folder, or a
    name on the hub."""
    layer: int | None = None
    """Recurrent layer. By default the head is taken whose writes do most, of those with a half-life of `memory`."""
    head: int | None = None
    """Head of that layer."""
    memory: float = 16.0
    """Least half-life of a write, in tokens, where no head is named."""
    d_sae: int = 256
    """Atoms of a dictionary."""
    training_tokens: int = 128_000
    """Tokens that each dictionary sees, in as many epochs of the text as that needs."""
    context_size: int = 128
    """Tokens per sequence."""
    train_sequences: int = 320
    """Sequences of the training text, or all that there are."""
    eval_sequences: int = 24
    """Sequences of the test."""
    n_atoms: int = 24
    """Times `firings_per_atom`: positions at which a write is replaced, drawn uniformly."""
    firings_per_atom: int = 3
    """See `n_atoms`."""
    seed: int = 0
    """Seed of training, draws and controls."""
    facts: int = 96
    """Facts that are written first in each of two models whose mechanism is known; 0: none."""
    out: Path = Path("writesae-out")
    """Folder for report.html, facts.json, the writes that were read, the dictionaries and the results."""

    def __post_init__(self) -> None:
        sizes = ("d_sae", "training_tokens", "context_size", "train_sequences", "eval_sequences", "n_atoms")
        at_least(self, dict.fromkeys((*sizes, "firings_per_atom"), 1) | {"memory": 0, "seed": 0, "facts": 0})

    def run(self, say: Callable[[str], object] = print) -> Path:
        """Train and test each dictionary, and write everything to `out`: the report, and for each dictionary `sae/` and
        its result `substitution/`. Nothing is overwritten: the same command resumes where it was stopped.

        Raises:
            ValueError: the head is not there, or `out` cannot be written or holds a demo with other settings; before
                any training.
        """
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
        check_writable(self.out)
        names = (FACTS, "collection", "report.html", "report.json", *map(_folder_name, RECIPES))
        check_settings(self.out, settings, names)
        check_ours(self.out / "report.html", self.out / "report.json")
        from hookpoints import HookedRecurrent, embedded
        from hookpoints.files import atomic_text
        from sae_lens_writesae.sae.collecting import collect
        from writesae.dictionary.quality import HEAD_SEQUENCES
        from writesae.experiment.terms import Terms
        from writesae.experiment.tokens import sample_sequences, say_time
        from writesae.page.report import write_report

        model = HookedRecurrent.from_pretrained(self.model)
        self.check_head(model)
        tokens = sample_sequences(model, embedded.text("test"), self.context_size, self.eval_sequences)
        text = sample_sequences(model, embedded.text("train"), self.context_size, self.train_sequences)
        with taken(self.out, say):
            say_time(model, text, DEMO_PASSES, self.out, say)
            facts = self.out / FACTS
            opening = read_facts(facts) if facts.exists() else write_facts(self.facts, say)
            layer, head, half_life, nats = self.choose_head(model, text[:HEAD_SEQUENCES])
            place = f"head {head} of layer {layer} ({model.cfg.layer(layer).rule})"
            effect = f"without its writes the model is off by {nats:.3f} nats per token"
            say(f"model {self.model!r}: {place}; half-life of a write {half_life:.0f} tokens; {effect}")
            keep_settings(self.out, settings, names)
            atomic_text(facts, json.dumps([dataclasses.asdict(panel) for panel in opening]))
            collection = collect(model, text, [layer], [head], self.out / "collection", dtype="float32")
            folders = {label: self.out / _folder_name(label) for label in RECIPES}
            terms = Terms(model, collection)
            missing = [label for label in RECIPES if not (folders[label] / "sae").exists()]
            say("\n".join(f"{'training' if label in missing else 'kept'}: {label}" for label in RECIPES))
            for label in missing:
                save_dictionary(self._trained(terms, collection, (layer, head), RECIPES[label]), folders[label])
            results = self._results(model, folders, tokens, terms)
            say(first_screen(results))
            return write_report(results, self.out / "report.html", opening=opening)

    def _results(
        self, model: HookedRecurrent, folders: Mapping[str, Path], tokens: Tensor, terms: Terms
    ) -> list[Result]:
        """The substitution test of each dictionary, by label in its folder; those that are saved are read."""
        from sae_lens_writesae.sae.load import load_sae
        from writesae.dictionary.quality import quality_of_heads
        from writesae.evaluations import load_result
        from writesae.evaluations.substitution import Substitution

        saes = {label: load_sae(folder / "sae") for label, folder in folders.items()}
        quality = quality_of_heads(model, saes, tokens, progress=True)
        results = []
        for label, sae in saes.items():
            folder = folders[label] / "substitution"
            if not folder.exists():
                test = Substitution(
                    n_atoms=self.n_atoms,
                    firings_per_atom=self.firings_per_atom,
                    atom_choice=("dominant",),
                    scales=("coefficient",),
                    controls=SHOWN_CONTROLS,
                    seed=self.seed,
                    label=label,
                )
                result = test.run(model, sae, tokens, reference=terms)
                measured = result.info | {"quality": {label: quality(label)}}
                dataclasses.replace(result, info=measured).save(folder)
            results.append(load_result(folder))
        return results

    def check_head(self, model: HookedRecurrent) -> None:
        """Raise UnsupportedModelError or ValueError where the layer or the head that is named is not there."""
        layer = model.cfg.recurrent_layers[0] if self.layer is None else self.layer
        n_heads = model.cfg.layer(layer).H
        if self.head is not None and not 0 <= self.head < n_heads:
            raise ValueError(f"head {self.head} is out of range: layer {layer} has heads 0 to {n_heads - 1}")

    def choose_head(self, model: HookedRecurrent, tokens: Tensor) -> tuple[int, int, float, float]:
        """Layer and head as named, or of the head whose writes do most, of those with a half-life of `memory` or more
        (of all, where there is none); its half-life in tokens, and nats per token where all its writes are deleted."""
        from writesae.dictionary.quality import head_effects, strongest_head

        self.check_head(model)
        layers = model.cfg.recurrent_layers if self.layer is None else [self.layer]
        effects = head_effects(model, tokens, layers, None if self.head is None else [self.head], progress=True)
        return strongest_head(effects, self.memory)

    def _trained(
        self, terms: Terms, collection: Collection, place: Sequence[int], metric: MetricName
    ) -> MatrixTrainingSAE:
        """A dictionary."""
        from sae_lens_writesae.sae.metric import DAMPING
        from sae_lens_writesae.sae.runner import train, training_config

        sizes = {name: getattr(self, name) for name in ("d_sae", "context_size", "seed", "training_tokens")}
        with quiet():
            fitted = None if metric == "frobenius" else terms.metric(*place, min(64, len(terms.tokens)), DAMPING)
            cfg = training_config(collection, *place, metric=metric, sae={"k": 1}, verbose=False, **sizes)
            return train(cfg, metric=fitted)


def _folder_name(label: str) -> str:
    return label.replace(", ", "-")


def read_facts(file: Path) -> list[Opening]:
    """The panels that an earlier call saved: numbers and text, whoever wrote the file.

    Raises:
        ValueError: the file holds something else; names it.
    """
    from pydantic import TypeAdapter, ValidationError

    from writesae.page.report import Opening

    try:
        return TypeAdapter(list[Opening]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{file}: expected the panels of a demo, got {error.error_count()} errors, first "
            f"{error.errors()[0]['msg']!r}; remove the file, and the facts are written again"
        ) from error


def write_facts(n: int, say: Callable[[str], object]) -> list[Opening]:
    """Write n facts (or attributes of facts) into memories by each of `SHOWN_METHODS`, and ask the model for them: a
    panel for each model of `SENTENCES`."""
    from writesae.known.board import board
    from writesae.page.report import Opening
    from writesae.page.template import share_text

    openings = []
    for name, title in SENTENCES.items() if n else ():
        with quiet():
            scores = board(name, 1, 1024, n, 500, brief=True)
        *text, old, new = scores["example"]
        rates = {row["method"]: row for row in scores["rows"]}
        atom = {kind: share_text(rate) for kind, rate in rates["writesae_product"].items() if isinstance(rate, dict)}
        example = f"{' '.join(text)} → {old}. One atom replaces one write: → {new}."
        shares = ", ".join(f"{kind} {rate}" for kind, rate in atom.items())
        sentence = f"An atom, {n} facts of `{name}`: {shares}. {RIVAL_SENTENCE}"
        rows: list[tuple[str, float, float, float]] = []
        for method, label in SHOWN_METHODS.items():
            changed = rates[method]["changed"]
            mean, low, high = (changed["mean"] if end is None else end for end in changed.values())
            rows.append((label, mean, low, high))
        openings.append(Opening(title, example, sentence, "facts that are answered with the new value", tuple(rows)))
        controls = ["{}: changed {:.0%} [{:.0%}, {:.0%}]".format(*row) for row in rows[1:]]
        say("\n  ".join([f"{title}.", example, sentence, *controls]))
    return openings


def first_screen(results: list[Result]) -> str:
    """What a reader should see first: quality, and one atom against what needs no training."""
    qualities = {result.label: cast(dict, result.info["quality"])[result.label] for result in results}
    claims = {result.label: result.claims()[0] for result in results}
    lines = ["", "Every write is replaced at once:", quality_table(qualities), "", "One atom replaces one write:"]
    for label, claim in claims.items():
        lines.append(f"  {label:24} {claim.measured}: {claim.outcome}. {claim.sentence}")
    first, *_ = claims.values()
    lines.append(f"  {'controls of the first':24} {first.controls}")
    return "\n".join(lines)
