"""The main job, end to end, on models that ship with the package: a memory that is read as facts and edited, and
dictionaries of what one head of a language model writes."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from tqdm import tqdm

from writesae.choices import MetricName, at_least
from writesae.dictionaries import Say, quality_table, quiet, save_dictionary
from writesae.files import Json, check_ours, check_settings, check_writable, keep_settings, taken

if TYPE_CHECKING:
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from hookpoints.memory.facts import PairDictionary
    from sae_lens_writesae.sae.factors import Collection
    from sae_lens_writesae.sae.training import MatrixTrainingSAE


RECIPES: dict[str, MetricName] = {"write-trained": "frobenius", "write-trained, metric": "gauss_newton"}
"""The dictionaries, and what errors are measured by: their squares, or the KL divergence that they cause."""
PAGE = "demo.html"
CIRCUIT = "circuit.svg"
STAGES = (
    "a memory read as facts",
    "what each head's writes do",
    "writes of one head",
    "training two dictionaries",
    "their quality on held-out text",
)
TOLD = "Ben lives in Rome . Iris keeps a parrot . Ben is a baker . Clara dresses in green ."
ASKED = "Ben lives in"
REPLACED = ("Rome", "Oslo")
"""What the model `facts` is told and asked, and the value that another one replaces: those of README."""
DEMO_PASSES = 2000
"""What the demo takes, in the time that a pass over a sequence does."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Tell a small model a few facts, read its memory as a list of them, replace one, and ask again; then train two
    dictionaries on what one head of a language model writes.

    The head is the one whose writes do most, of those that remember for a while. One dictionary is trained for squared
    errors, one for errors in the model's own metric. A table says what they recover on held-out text. The page has the
    memory before and after, the circuit of the first answer, and the table.
    Offline, in less than a minute on two cores."""

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
    """Sequences of the held-out text."""
    seed: int = 0
    """Seed of training."""
    out: Path = Path("writesae-out")
    """Folder for demo.html, circuit.svg, the writes that were read, and the dictionaries."""

    def __post_init__(self) -> None:
        sizes = ("d_sae", "training_tokens", "context_size", "train_sequences", "eval_sequences")
        at_least(self, dict.fromkeys(sizes, 1) | {"memory": 0, "seed": 0})

    def run(self, say: Say = print) -> Path:
        """Read and edit the memory, train the dictionaries, and write everything to `out`: the page, the picture of a
        circuit, and for each dictionary `sae/`. Dictionaries are not overwritten: the same command resumes where it
        was stopped.

        Raises:
            ValueError: the head is not there, or `out` cannot be written or holds a demo with other settings; before
                any training.
        """
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
        check_writable(self.out)
        names = (PAGE, CIRCUIT, "collection", *map(_folder_name, RECIPES))
        check_settings(self.out, settings, names)
        check_ours(self.out / PAGE)
        from hookpoints import HookedRecurrent, embedded
        from hookpoints.files import atomic_text
        from sae_lens_writesae.sae.collecting import collect
        from writesae.experiment.tokens import sample_sequences, say_time

        with one_bar(STAGES, say) as stages:
            stages.next()
            model = HookedRecurrent.from_pretrained(self.model)
            self.check_head(model)
            tokens = sample_sequences(model, embedded.text("test"), self.context_size, self.eval_sequences)
            text = sample_sequences(model, embedded.text("train"), self.context_size, self.train_sequences)
            with taken(self.out, stages.say):
                say_time(model, text, DEMO_PASSES, self.out, stages.say)
                recalled = recall()
                keep_settings(self.out, settings, names)
                atomic_text(self.out / CIRCUIT, recalled.circuit)
                stages.say(recalled.told())
                stages.next()
                place = self._say_head(model, text, stages.say)
                stages.next()
                collection = collect(model, text, [place[0]], [place[1]], self.out / "collection", dtype="float32")
                stages.next()
                folders = {label: self.out / _folder_name(label) for label in RECIPES}
                for label, folder in folders.items():
                    if not (folder / "sae").exists():
                        save_dictionary(self._trained(model, collection, place, RECIPES[label]), folder)
                stages.next()
                quality = dictionary_qualities(model, folders, tokens)
                stages.say(quality_table(quality))
                page = atomic_text(self.out / PAGE, page_of(recalled, quality))
        say(f"circuit   {self.out / CIRCUIT}\n\nopen in a browser:")
        return page

    def _say_head(self, model: HookedRecurrent, text: Tensor, say: Say) -> tuple[int, int]:
        """The layer and the head that are chosen."""
        from writesae.dictionary.quality import HEAD_SEQUENCES

        layer, head, half_life, nats = self.choose_head(model, text[:HEAD_SEQUENCES])
        place = f"head {head} of layer {layer} ({model.cfg.layer(layer).rule})"
        memory = f"half of a write is left after {half_life:.0f} tokens"
        say(f"model {self.model!r}, {place}: {memory}; deleting all writes costs {nats:.3f} nats a token")
        return layer, head

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
        self, model: HookedRecurrent, collection: Collection, place: tuple[int, int], metric: MetricName
    ) -> MatrixTrainingSAE:
        """A dictionary."""
        from sae_lens_writesae.sae.metric_fit import fit_metrics
        from sae_lens_writesae.sae.runner import train, training_config

        sizes = {name: getattr(self, name) for name in ("d_sae", "context_size", "seed", "training_tokens")}
        with quiet():
            fitted = None if metric == "frobenius" else fit_metrics(model, collection.tokens[:64], [place])[place]
            cfg = training_config(collection, *place, metric=metric, sae={"k": 1}, verbose=False, **sizes)
            return train(cfg, metric=fitted)


def _folder_name(label: str) -> str:
    return label.replace(", ", "-")


def dictionary_qualities(model: HookedRecurrent, folders: Mapping[str, Path], tokens: Tensor) -> dict[str, Json]:
    """What each dictionary recovers on tokens [N,T], as `DictionaryQuality.to_dict` has it, by label."""
    from sae_lens_writesae.sae.load import load_sae
    from writesae.dictionary.quality import quality_of_heads

    saes = {label: load_sae(folder / "sae") for label, folder in folders.items()}
    quality = quality_of_heads(model, saes, tokens)
    return {label: quality(label) for label in saes}


class Held(NamedTuple):
    """A memory in words."""

    title: str
    facts: tuple[tuple[str, float], ...]
    """With their strengths."""
    answer: str
    """To the question, and its probability."""
    share: float


@dataclass(frozen=True)
class Recalled:
    """A text that a model was told, its memory as facts, and with one of them replaced."""

    text: str
    question: str
    memories: tuple[Held, ...]
    circuit: str
    """An SVG element, which the page shows as it is: what made the first answer."""

    def told(self) -> str:
        """As lines of a terminal."""
        lines = [f"text      {self.text}"]
        for title, held in zip(("memory", "replaced"), self.memories):
            facts = ", ".join(f"{fact} {strength:.2f}" for fact, strength in held.facts)
            lines += [f"{title:8}  {facts}", f"answer    {self.question} {held.answer} ({held.share:.0%})"]
        return "\n".join(lines)


def page_of(recalled: Recalled, qualities: Mapping[str, Json]) -> str:
    """The page, as HTML that needs no network."""
    from writesae.page.template import environment

    shown = {label: quality for label, quality in qualities.items() if quality}
    return environment().get_template("demo.html").render(recalled=recalled, qualities=shown)


def recall() -> Recalled:
    """Tell the model `facts` a text, read its memory as facts, replace one, ask for it before and after, and find the
    circuit of the first answer."""
    import torch

    from hookpoints import HookedRecurrent, attribute, zoo
    from sae_lens_writesae.sae.load import load_sae

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
