"""What the prompt page asks, answered: from JSON to JSON. A request names the text and the question that were read, and
the changes. Of a page nothing is saved but what took long to make, by what was asked: several pages may ask at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from sae_lens import SAE

from hookpoints import Graph, HookedRecurrent, MemoryReader, attribute, embedded
from hookpoints.errors import InputError
from sae_lens_writesae.sae.target import HeadHook
from writesae.experiment.firings import collect_firings
from writesae.page.atoms.text import TokenTexts, short, visible
from writesae.page.remembered import PromptText

MAX_TOKENS = 256
"""Longest text that is read: a page shows a number for each pair of tokens."""
FITTED = 60_000
"""Characters of text to which a reader is fitted."""
KEPT = 8
"""Texts whose memory stays, and graphs: of those that were asked for last."""


class Session:
    """Answers about texts that a model reads.

    Args:
        saes: dictionaries of its heads; of several of one head the first.
        reader: None: one is fitted when it is first asked for.
    """

    def __init__(self, model: HookedRecurrent, saes: Sequence[SAE[Any]], reader: MemoryReader | None = None) -> None:
        self.model = model
        self.saes = {HeadHook.of(each).cell: each for each in reversed(saes)}
        self.texts = TokenTexts(model)
        self._reader = reader

    def answer(self, path: str, asked: Mapping[str, Any]) -> object:
        """The JSON values that a page gets for those that it sends to one of `ANSWERS`: `text` and `question` as it
        read them, and what the path needs: `spans`, the changes; or `target` and `against` of a graph.

        Raises:
            InputError, KeyError, TypeError, ValueError: something is missing, or does not fit the model.
        """
        return ANSWERS[path](self, asked)

    def changed_memory(self, asked: Mapping[str, Any]) -> object:
        """The text as tokens and sentences, and the answers before and after the changes."""
        prompt = self.prompted(asked["text"], asked["question"])
        return {
            "tokens": [visible(piece) for piece in self.texts.many(prompt.tokens[0].tolist())],
            "first": prompt.first,
            "stop": prompt.memory.T,
            "sentences": prompt.sentences(),
            **prompt.answers(prompt.changed(asked["spans"])),
        }

    def read_memory(self, asked: Mapping[str, Any]) -> object:
        """Scores of `phrases`, and where `back` is true the phrases that are read back."""
        prompt = self.prompted(asked["text"], asked["question"])
        memory = prompt.changed(asked["spans"])
        reader = self.reader()
        back = prompt.read_back(reader, memory) if asked["back"] else None
        scores = prompt.scores(reader, memory, asked["phrases"])
        return {"scores": scores, "back": back, "longest": reader.fitted.longest}

    def picture(self, asked: Mapping[str, Any]) -> object:
        """The picture of the graph, so many pixels wide: `svg`; `said`, how far predictions hold; `target`."""
        graph = self.explained(asked["text"], asked["question"], asked["target"], asked["against"])
        width = min(max(int(asked["width"]), 320), 1200)
        check = str(graph.check()) if len(cast("list[str]", graph.metadata["tokens"])) > 1 else ""
        return {"svg": graph.draw(width=width), "said": check, "target": graph.metadata["title"]}

    def sources(self, asked: Mapping[str, Any]) -> object:
        """What made the `node` of the graph."""
        graph = self.explained(asked["text"], asked["question"], asked["target"], asked["against"])
        return made_of(graph, asked["node"])

    def reader(self) -> MemoryReader:
        """The one that was given, or else one that is fitted now to text that ships with the package.

        Raises:
            InputError: the model has no tokens for that text.
        """
        if self._reader is None:
            try:
                self._reader = MemoryReader.fit(self.model, embedded.text("train")[:FITTED], context=64, longest=8)
            except InputError as error:
                raise InputError(
                    "reader: expected a model that reads English, or --reader FILE, got neither"
                ) from error
        return self._reader

    @lru_cache(KEPT)  # noqa: B019 (a process has one session)
    @torch.no_grad()
    def prompted(self, text: str, question: str) -> PromptText:
        """A text and a question, read: each of some tokens, and both of at most `MAX_TOKENS`.

        Raises:
            ValueError: there are no tokens, or more.
        """
        tokens = self.model.to_tokens(text, truncate=False)
        asked = self.model.to_tokens(f" {question.strip()}", prepend_bos=False, truncate=False)
        total = tokens.shape[1] + asked.shape[1]
        if not text.strip() or not question.strip() or total > MAX_TOKENS:
            raise ValueError(f"text, question: expected words of each, at most {MAX_TOKENS} tokens in all, got {total}")
        return PromptText(self.model, self.texts, self.model.memory(tokens), asked)

    @lru_cache(KEPT)  # noqa: B019
    def explained(self, text: str, question: str, target: str, against: str) -> Graph:
        """Why the model says a token after a question, of the text as it was read.

        Args:
            target, against: the token, and that whose logit is taken off; empty for the most likely one, and the mean.

        Raises:
            ValueError: a target is not one token.
        """
        tokens = self.prompted(text, question).tokens
        # All nodes of a text of sixty tokens take five times as long as the likely ones.
        return attribute(tokens, self.model, target or None, against or None, 50, saes=list(self.saes.values()))

    def atoms(self, asked: Mapping[str, Any]) -> dict[str, list[list[tuple[str, float]]]]:
        """For each head with a dictionary, by its name [T]: active atoms with their activation, largest first.

        Cost: for each a forward up to its layer.
        """
        prompt = self.prompted(asked["text"], asked["question"])
        atoms = {}
        for cell, sae in self.saes.items():
            firings = collect_firings(self.model, sae, HeadHook.of(sae).layer, prompt.tokens).frame()
            by_position = firings.sort_values("activation", ascending=False).groupby("position")
            rows = [list[tuple[str, float]]() for _ in prompt.tokens[0]]
            for position, here in by_position:
                named = zip(here["atom"], here["activation"])
                rows[cast(int, position)] = [(f"atom {atom}", short(value)) for atom, value in named]
            atoms[cell] = rows
        return atoms


def made_of(graph: Graph, node: str) -> dict[str, list[tuple[str, float, bool]]]:
    """What made a node: for each port the largest sources, with their effect and whether it was measured. The query of
    a write is that of the last token.

    Raises:
        ValueError: there is no such node.
    """
    named = graph.nodes[graph.nodes.node_id == node]
    if not len(named):
        raise ValueError(f"node: expected one of the picture, got {node!r}")
    row = named.iloc[0]
    table = graph.edges[graph.edges.target == node]
    if row.feature_type in ("write", "attn", "mlp"):
        last = len(cast("list[str]", graph.metadata["tokens"])) - 1
        table = graph.why(node, read=last if row.feature_type == "write" else None)
    ports: dict[str, list[tuple[str, float, bool]]] = {}
    for edge in table.to_dict("records"):
        is_measured = edge["measured"] == edge["measured"]
        effect = short(edge["measured"] if is_measured else edge["predicted"])
        ports.setdefault(edge["port"], []).append((edge["source"], effect, is_measured))
    return {port: edges[:8] for port, edges in ports.items()}


ANSWERS: dict[str, Callable[[Session, Mapping[str, Any]], object]] = {
    "/memory": Session.changed_memory,
    "/reader": Session.read_memory,
    "/atoms": Session.atoms,
    "/explain": Session.picture,
    "/node": Session.sources,
}
"""What a page may ask for, by path."""
