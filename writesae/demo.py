"""The main job, end to end, on models that ship with the package: facts that atoms write, dictionaries of a language
model's writes, tested, and a memory that is read as facts."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from writesae.choices import MetricName, at_least
from writesae.dictionaries import Say, quality_table, quiet, save_dictionary
from writesae.files import check_page, check_settings, check_writable, keep_settings, taken

if TYPE_CHECKING:
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from hookpoints.memory.facts import PairDictionary
    from sae_lens_writesae.sae.factors import Collection
    from sae_lens_writesae.sae.training import MatrixTrainingSAE
    from writesae.experiment.conditions import Control
    from writesae.experiment.evaluation import Result
    from writesae.experiment.terms import Terms
    from writesae.page.report import Opening, Recalled


RECIPES: dict[str, MetricName] = {"write-trained": "frobenius", "write-trained, metric": "gauss_newton"}
"""The dictionaries, and what errors are measured by: their squares, or the KL divergence that they cause."""
FACTS = "facts.json"
CIRCUIT = "circuit.svg"
STAGES = (
    "facts that atoms write",
    "what each head's writes do",
    "writes of one head",
    "training two dictionaries",
    "testing their atoms",
    "a memory read as facts",
)
TOLD = "Ben lives in Rome . Iris keeps a parrot . Ben is a baker . Clara dresses in green ."
ASKED = "Ben lives in"
REPLACED = ("Rome", "Oslo")
"""What the model `facts` is told and asked, and the value that another one replaces: those of README."""
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

    def run(self, say: Say = print) -> Path:
        """Train and test each dictionary, and write everything to `out`: the report, the picture of a circuit, and for
        each dictionary `sae/` and its result `substitution/`. Nothing is overwritten but the picture: the same command
        resumes where it was stopped.

        Raises:
            ValueError: the head is not there, or `out` cannot be written or holds a demo with other settings; before
                any training.
        """
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
        check_writable(self.out)
        names = (FACTS, CIRCUIT, "collection", "report.html", "report.json", *map(_folder_name, RECIPES))
        check_settings(self.out, settings, names)
        check_page(self.out / "report.html")
        from hookpoints import HookedRecurrent, embedded
        from hookpoints.files import atomic_text, sealed_json
        from sae_lens_writesae.sae.collecting import collect
        from writesae.experiment.terms import Terms
        from writesae.experiment.tokens import sample_sequences, say_time
        from writesae.page.report import write_report

        with one_bar(STAGES, say) as stages:
            stages.next()
            model = HookedRecurrent.from_pretrained(self.model)
            self.check_head(model)
            tokens = sample_sequences(model, embedded.text("test"), self.context_size, self.eval_sequences)
            text = sample_sequences(model, embedded.text("train"), self.context_size, self.train_sequences)
            with taken(self.out, stages.say):
                say_time(model, text, DEMO_PASSES, self.out, stages.say)
                facts = self.out / FACTS
                opening = read_facts(facts) if facts.exists() else write_facts(self.facts)
                stages.next()
                place = self._say_head(model, text, stages.say)
                keep_settings(self.out, settings, names)
                atomic_text(facts, sealed_json({"panels": [dataclasses.asdict(panel) for panel in opening]}))
                stages.next()
                collection = collect(model, text, [place[0]], [place[1]], self.out / "collection", dtype="float32")
                stages.next()
                terms = Terms(model, collection)
                folders = {label: self.out / _folder_name(label) for label in RECIPES}
                for label, folder in folders.items():
                    if not (folder / "sae").exists():
                        save_dictionary(self._trained(terms, collection, place, RECIPES[label]), folder)
                stages.next()
                results = self._results(model, folders, tokens, terms)
                stages.say(quality_table({result.label: _quality(result) for result in results}))
                stages.next()
                recalled = recall()
                atomic_text(self.out / CIRCUIT, recalled.circuit)
                page = write_report(results, self.out / "report.html", opening=opening, recalled=recalled)
        say(f"\n{recalled.told()}\ncircuit   {self.out / CIRCUIT}\n\nopen in a browser:")
        return page

    def _say_head(self, model: HookedRecurrent, text: Tensor, say: Say) -> tuple[int, int]:
        """The layer and the head that are chosen."""
        from writesae.dictionary.quality import HEAD_SEQUENCES

        layer, head, half_life, nats = self.choose_head(model, text[:HEAD_SEQUENCES])
        place = f"head {head} of layer {layer} ({model.cfg.layer(layer).rule})"
        memory = f"half of a write is left after {half_life:.0f} tokens"
        say(f"model {self.model!r}, {place}: {memory}; deleting all writes costs {nats:.3f} nats a token")
        return layer, head

    def _results(
        self, model: HookedRecurrent, folders: Mapping[str, Path], tokens: Tensor, terms: Terms
    ) -> list[Result]:
        """The substitution test of each dictionary, by label in its folder; those that are saved are read."""
        from sae_lens_writesae.sae.load import load_sae
        from writesae.dictionary.quality import quality_of_heads
        from writesae.evaluations import load_result
        from writesae.evaluations.substitution import Substitution

        saes = {label: load_sae(folder / "sae") for label, folder in folders.items()}
        quality = quality_of_heads(model, saes, tokens)
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
                result = test.run(model, sae, tokens, reference=terms, progress=False)
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
        effects = head_effects(model, tokens, layers, None if self.head is None else [self.head])
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


def _quality(result: Result) -> object:
    return cast(dict, result.info["quality"])[result.label]


def _folder_name(label: str) -> str:
    return label.replace(", ", "-")


def read_facts(file: Path) -> list[Opening]:
    """The panels that an earlier call saved: numbers and text, whoever wrote the file.

    Raises:
        ValueError: the file holds something else, or was damaged or edited; names it.
    """
    from pydantic import TypeAdapter, ValidationError

    from hookpoints.files import read_sealed_json
    from writesae.page.report import Opening

    try:
        return TypeAdapter(list[Opening]).validate_python(read_sealed_json(file).get("panels"))
    except ValidationError as error:
        raise ValueError(
            f"{file}: expected the panels of a demo, got {error.error_count()} errors, first "
            f"{error.errors()[0]['msg']!r}; remove the file, and the facts are written again"
        ) from error


def write_facts(n: int) -> list[Opening]:
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
    return openings


def recall() -> Recalled:
    """Tell the model `facts` a text, read its memory as facts, replace one, ask for it before and after, and find the
    circuit of the first answer."""
    import torch

    from hookpoints import HookedRecurrent, attribute, zoo
    from sae_lens_writesae.sae.load import load_sae
    from writesae.page.report import Held, Recalled

    with quiet():
        model = HookedRecurrent.from_pretrained("facts").requires_grad_(False)
    pairs = cast("PairDictionary", load_sae(zoo.path("facts") / "pairs"))
    old, new = REPLACED
    memory = model.memory(TOLD)
    edited = memory.with_fact(pairs, ASKED, new, instead_of=old)
    memories = []
    for title, state in (("What its memory holds", memory), (f"The memory with {new} instead of {old}", edited)):
        chances = model.logits_after(state, ASKED)[0, -1].softmax(-1)
        facts = [(f"{fact.key} → {fact.value}", fact.strength) for fact in state.facts(pairs, n=4)]
        answer = str(model.to_string(int(chances.argmax()))).strip()
        memories.append(Held(title, tuple(facts), answer, float(chances.max())))
    with torch.enable_grad():
        graph = attribute(f"{TOLD} {ASKED}", model, [old], against=new, frozen=True)
    return Recalled(TOLD, ASKED, tuple(memories), graph.draw())


class Stages(io.TextIOBase):
    """The only bar of a command: which stage it is at. It stands in for standard error. Bars that libraries draw there
    move its clock and are not shown; other lines appear above it. Where standard error is no terminal, there is none.
    """

    def __init__(self, names: Sequence[str], say: Say):
        self._names = iter(names)
        self._say = say
        self._stream = sys.stderr
        shown = "{desc} |{bar:24}| {elapsed}"
        self.bar = tqdm(total=len(names), disable=None, leave=False, bar_format=shown, miniters=0)
        self._stage = 0

    def next(self) -> None:
        """The next stage begins."""
        self.bar.n = self._stage
        self._stage += 1
        self.bar.set_description_str(f"stage {self._stage} of {self.bar.total}: {next(self._names)}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.clear()
        self._say(line)
        self.bar.refresh()

    def write(self, text: str) -> int:
        """What somebody writes to standard error."""
        is_bar = text.startswith(("\r", "\x1b["))
        if is_bar or not text.strip():
            self.bar.update(0)
        else:
            self.bar.clear()
            print(text.rstrip("\n"), file=self._stream)
            self.bar.refresh()
        return len(text)


@contextmanager
def one_bar(stages: Sequence[str], say: Say) -> Iterator[Stages]:
    """A scope in which `Stages` is all that is drawn."""
    shown = Stages(stages, say)
    with shown.bar, redirect_stderr(shown):
        yield shown
