"""What the prompt page does with a memory: phrases that are cut or replaced, and the answers before and after."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, Memory, MemoryReader
from hookpoints.errors import InputError
from writesae.page.atoms.text import TokenTexts, short, visible

LIKELIEST = 5
"""Next tokens that are shown."""
CONTINUED = 16
"""Tokens of an answer, at most."""
SHARED = 3
"""Tokens in a row that a phrase which is read back shares with the text, if it is found there."""
READ_BACK = 4
"""Phrases that are read back."""
_END = re.compile(r"[.!?]")
_SPEECH = (
    "The crops were good, and no nation has reason to complain of us. Clara lives in Paris. Our commerce has been "
    "extended to new markets. The home of Clara is Vienna. We are at peace with all nations."
)
_DEFAULTS = {
    "facts-english": (_SPEECH, "Where does Clara live?"),
    "facts": ("Jack dresses in green . Mia lives in Quito . Jack keeps a parrot .", "Mia lives in"),
    "recall": ("Mia Havana Jack Ghent Sara Moscow Boris Paris", "Mia"),
    "composition": ("Mia blue-brass-ring Boris pink-glass-cup", "Boris color?"),
    "induction": ("w12 w27 w2 w3 w18 w13", "w12"),
    "parity": ("1 0", "1"),
}
"""A text and a question for models of the zoo, by the name without that of another family."""
_ANY = (
    "The war with Mexico was over. The Secretary of the Treasury will report. The army has returned to its posts.",
    "The report of the Secretary of the",
)


def default_prompt(name: str) -> tuple[str, str]:
    """A text and a question that a model can answer, or one that every reader of English can read."""
    return _DEFAULTS.get(re.sub("-(kda|mamba2|rwkv7)$", "", name), _ANY)


Change = tuple[int, int, str | None]
"""Tokens start <= t < stop of a text, and what is told instead of them; None: they are cut."""


class PromptText(NamedTuple):
    """A text and a question, as a model read them."""

    model: HookedRecurrent
    texts: TokenTexts
    memory: Memory
    question: Tensor
    """[1,T]"""

    @property
    def first(self) -> int:
        """The first token that is no begin-of-sequence token."""
        tokenizer = self.model.tokenizer
        return int(tokenizer is not None and int(self.memory.tokens[0, 0]) == tokenizer.bos_token_id)

    @property
    def tokens(self) -> Tensor:
        """[1,T] of both."""
        return torch.cat([self.memory.tokens, self.question], 1)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Tokens as they are read."""
        return str(self.model.to_string(list(tokens))).strip()

    def sentences(self) -> list[tuple[int, int, str, float, str]]:
        """Start and stop of each sentence that was read, with the answer without it, its probability, and what a
        flagged sentence did to the other answer; none where there are no two sentences."""
        rows = list[tuple[int, int, str, float, str]]()
        with suppress(InputError):
            for suspect in sorted(self.memory.suspects(self.question)):
                start, stop = suspect.span
                answer = suspect.answer.strip()
                did = ("overwrote" if suspect.overwrote else "contradicts") if suspect.flagged else ""
                rows.append((max(start, self.first), stop, answer, short(suspect.probability), did))
        return rows

    def changed(self, changes: Sequence[Change]) -> Memory:
        """The memory with all changes; all tokens after them are read again.

        Raises:
            InputError: what `Memory.without` and `told` raise.
        """
        memory = self.memory
        for start, stop, new in sorted(changes, reverse=True):  # the last first, so that others keep their place
            if new is None:
                memory = memory.without((start, stop))
            else:
                memory = memory.told(f" {new.strip()}", instead_of=slice(start, stop))
        return memory

    def answers(self, memory: Memory) -> dict[str, object]:
        """What the model says after the question, from the memory as it was read and from another one: the sentence
        (`said`), the five likeliest next tokens with their probabilities, and the KL divergence in nats over the
        tokens of the first sentence, from the other memory's predictions to those of the first."""
        # Both memories are asked for the sentence that the first one says, so that their predictions compare.
        sentence = self._next_sentence(self.memory)
        asked = torch.cat([self.question, sentence], 1)
        start = self.question.shape[1] - 1
        logits = [self.model.logits_after(each, asked)[0, start:-1].double() for each in (self.memory, memory)]
        before, after = (each.log_softmax(-1) for each in logits)
        sentences = (sentence, self._next_sentence(memory))
        return {
            "answers": [
                {"said": self.text_of(answer[0].tolist()), "likeliest": self._likely_tokens(log_probs[0])}
                for answer, log_probs in zip(sentences, (before, after))
            ],
            "kl": short(float((before.exp() * (before - after)).sum())),
        }

    def _next_sentence(self, memory: Memory) -> Tensor:
        """[1,T] of the likeliest tokens after the question, up to the end of a sentence."""
        asked = self.question
        out = self.model.generate(asked, memory=memory, do_sample=False, max_new_tokens=CONTINUED)
        new = out[:, asked.shape[1] :]
        ends = [place for place, text in enumerate(self.texts.many(new[0].tolist())) if _END.search(text)]
        return new[:, : ends[0] + 1] if ends else new

    def _likely_tokens(self, log_probs: Tensor) -> list[tuple[str, float]]:
        top = log_probs.exp().topk(LIKELIEST)
        chances = zip(top.indices.tolist(), top.values.tolist())
        return [(visible(self.texts[token]), short(chance)) for token, chance in chances]

    def scores(self, reader: MemoryReader, memory: Memory, spans: Sequence[tuple[int, int]]) -> list[list[float]]:
        """Scores of phrases (`Reading.score`): by the memory as it was read, by another one, and by one that read all
        other tokens. Of a long phrase the last tokens count."""
        tokens = self.memory.tokens
        rows = list[list[float]]()
        for start, stop in spans:
            phrase = tokens[0, start:stop].tolist()[-reader.fitted.longest :]
            # A memory that never read the phrase: what a cut should come to.
            never = self.model.memory(torch.cat([tokens[:, :start], tokens[:, stop:]], 1))
            memories = (self.memory, memory, never)
            rows.append([short(float(reader.scores(each, [phrase]))) for each in memories])
        return rows

    def read_back(self, reader: MemoryReader, memory: Memory) -> list[dict[str, object]]:
        """The phrases that a memory most likely read, in words, with their place in the text if it has them."""
        tokens = self.memory.tokens[0].tolist()
        phrases = list[dict[str, object]]()
        for reading in reader.read_back(memory, READ_BACK, beam=3 * READ_BACK):
            match = SequenceMatcher(None, reading.tokens, tokens, autojunk=False).find_longest_match()
            place = (match.b, match.b + match.size) if match.size >= SHARED else None
            phrases.append({"text": self.text_of(reading.tokens), "score": short(reading.score), "span": place})
        return phrases
