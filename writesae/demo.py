"""The main job, end to end, on models that ship with the package: a memory that is read back and cut, and dictionaries
of what one head of a language model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, MemoryReader, attribute, embedded, forgot
from hookpoints.files import atomic_text
from hookpoints.scopes import threads_for
from sae_lens_writesae.sae.load import load_sae
from writesae.choices import DictionaryName
from writesae.collecting import Say, check_text
from writesae.dictionary.quality import HEAD_SEQUENCES, head_effects, quality_of_heads, strongest_head
from writesae.experiment.tokens import sample_sequences, say_time
from writesae.files import Json, check_ours, check_writable
from writesae.flags import Demo, Train
from writesae.page.atoms.text import TokenTexts
from writesae.page.remembered import PromptText, default_prompt
from writesae.page.template import environment
from writesae.training import quality_table, quiet, run_train

PAGE = "demo.html"
STORY = "facts-english"
"""The model whose memory is read back and cut."""
FITTED = 20_000
"""Characters of speeches, of which the text is one: a reader is fitted to them, and the head chosen on them."""
CONTEXT = 128
"""Tokens of a sequence that a dictionary is trained and measured on."""
DEMO_PASSES = 2000
"""What the demo takes, in the time that a pass over a sequence does."""


def run_demo(flags: Demo, say: Say = print) -> Path:
    """Read and cut the memory, train the dictionaries as `writesae train` does, and write the page to `out`. The same
    command resumes where it was stopped.

    Raises:
        ValueError: `out` cannot be written or holds dictionaries with other settings, or the model does not ship with
            the package; before any training.
    """
    check_writable(flags.out)
    check_ours(flags.out / PAGE)
    check_text(flags.model, None)
    say("1 of 4: a memory, read back and cut")
    model = HookedRecurrent.from_pretrained(flags.model)
    tokens = sample_sequences(model, embedded.text("test"), CONTEXT, flags.eval_sequences)
    with threads_for(0):  # two threads cost more than they win here
        say_time(model, tokens, DEMO_PASSES, flags.out, say)
        recalled = recall()
        say(recalled.lines())
        say("2 of 4: what each head's writes do")
        head = choose_head(model, sample_sequences(model, embedded.text("train")[:FITTED], CONTEXT, HEAD_SEQUENCES))
        say(str(head))
        say("3 of 4: two dictionaries of what this head writes")
        train = train_flags(flags, head)
        run_train(train, say)
        say("4 of 4: their quality on held-out text")
        folder = flags.out / f"L{head.layer}H{head.head}"
        saes = {name: load_sae(folder / name / "sae") for name in train.names}
        quality = quality_of_heads(model, saes, tokens)
        qualities = {name: quality(name) for name in saes}
        say(quality_table(qualities))
        page = atomic_text(flags.out / PAGE, page_of(recalled, head, qualities))
    say(f"\n{recalled.lines()}\n\nopen in a browser:")
    return page


def train_flags(flags: Demo, head: ChosenHead) -> Train:
    """What is trained: a dictionary for squared errors, and one for the KL divergence that errors cause."""
    names = (DictionaryName("write", seed=flags.seed), DictionaryName("write", seed=flags.seed, metric="gauss_newton"))
    return Train(
        model=flags.model,
        layers=(head.layer,),
        heads=(head.head,),
        names=tuple(map(str, names)),
        d_sae=flags.d_sae,
        training_tokens=flags.training_tokens,
        context_size=CONTEXT,
        out=flags.out,
        summary=False,
    )


class ChosenHead(NamedTuple):
    """The head whose writes dictionaries are trained on."""

    model: str
    rule: str
    layer: int
    head: int
    half_life: float
    """Tokens after which half of a write is left."""
    nats: float
    """Per token where all its writes are deleted: KL(native || edited)."""

    def __str__(self) -> str:
        memory = f"half of a write is left after {self.half_life:.0f} tokens"
        place = f"head {self.head} of layer {self.layer} ({self.rule})"
        return f"model {self.model!r}, {place}: {memory}; deleting all writes costs {self.nats:.3f} nats a token"


def choose_head(model: HookedRecurrent, tokens: Tensor) -> ChosenHead:
    """The head whose writes do most, of those that remember for a while."""
    layer, head, half_life, nats = strongest_head(head_effects(model, tokens))
    return ChosenHead(model.cfg.model_name, model.cfg.layer(layer).rule, layer, head, half_life, nats)


class RecalledMemory(NamedTuple):
    """What a memory tells."""

    title: str
    phrases: list[dict[str, object]]
    """Phrases that are read back from it: `text`, `score` and `span`, the tokens of the text that they share."""
    answer: str
    """To the question, and its probability."""
    share: float


@dataclass(frozen=True)
class Recalled:
    """A text that a model read, and what its memory tells before and after a sentence is cut out of it."""

    sentences: dict[str, tuple[str, float]]
    """Those of the text, with the answer without each and its probability."""
    cut: str
    """The sentence that is cut: that on which the answer hangs most."""
    question: str
    memories: list[RecalledMemory]
    """As it was read, and after the cut."""
    certificate: str
    """Whether the sentence is gone, as `forgot` says it."""
    scores: dict[str, float]
    """Log odds that the sentence was read, by memory."""
    circuit: str
    """An SVG element, which the page shows as it is: what made the answer."""

    def lines(self) -> str:
        """As lines of a terminal."""
        lines = []
        for memory in self.memories:
            phrases = " | ".join(str(phrase["text"]) for phrase in memory.phrases)
            lines.append(f"{memory.title}: {phrases}\n{self.question} {memory.answer} ({memory.share:.0%})")
        scores = ", ".join(f"{name} {score:.1f}" for name, score in self.scores.items())
        return "\n".join([*lines, f"The reader's score of “{self.cut}”: {scores}"])


def page_of(recalled: Recalled, head: ChosenHead, qualities: Mapping[str, Json]) -> str:
    """The page, as HTML that needs no network."""
    shown = {label: quality for label, quality in qualities.items() if quality}
    return environment().get_template("demo.html").render(recalled=recalled, head=head, qualities=shown)


def recall() -> Recalled:
    """Let a model read a text, read its memory back, cut the sentence that an answer hangs on, ask again, and find the
    circuit of the answer."""
    with quiet():
        model = HookedRecurrent.from_pretrained(STORY).requires_grad_(False)
    text, question = default_prompt(STORY)
    asked = model.to_tokens(f" {question}", prepend_bos=False)
    prompt = PromptText(model, TokenTexts(model), model.memory(text), asked)
    reader = MemoryReader.fit(model, embedded.text("train")[:FITTED], context=64, longest=8)
    suspect = prompt.memory.suspects(asked)[0]  # the sentence without which the answer changes most
    cut = prompt.memory.without(suspect.span)
    memories = []
    for title, memory in (("Its memory", prompt.memory), ("After the cut", cut)):
        share, token = model.logits_after(memory, asked)[0, -1].softmax(-1).max(-1)
        answer = str(model.to_string(int(token))).strip()
        memories.append(RecalledMemory(title, prompt.read_back(reader, memory), answer, float(share)))
    tokens = prompt.memory.tokens[0].tolist()
    with torch.enable_grad():
        graph = attribute(prompt.tokens, model, [f" {memories[0].answer}"], against=suspect.answer, measure=50)
    return Recalled(
        sentences={
            prompt.text_of(tokens[start:stop]): (answer, share) for start, stop, answer, share, _ in prompt.sentences()
        },
        cut=suspect.text.strip(),
        question=question,
        memories=memories,
        certificate=str(forgot(prompt.memory, cut, suspect.span)),
        scores=dict(zip(("read", "cut", "never read"), prompt.scores(reader, cut, [suspect.span])[0])),
        circuit=graph.draw(width=360),
    )
