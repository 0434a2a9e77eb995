"""One edit in words: which next tokens it makes more or less likely, in a sentence of the text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from writesae.experiment.lab import EditedRows, Lab, Site, Trial
from writesae.experiment.readout import divergences

WORDS = 6
"""Next tokens that an example shows."""
_BEFORE, _AFTER = 24, 4
"""Tokens of the sentence before the edit, and after the token at which predictions are shown."""


def changed_words(lab: Lab, site: Site, trials: Sequence[Trial], window: int) -> pd.DataFrame:
    """Next-token probabilities under some edits of one token, where the first of them moves the model most.

    Args:
        trials: edits at one position; `row["condition"]` names each. The native model comes first in the result.
        window: tokens that are looked at, from the edit on.

    Returns: columns text (the sentence, the edited token in brackets), read_at (tokens after the edit at which the
    probabilities were read), condition, word, probability; the `WORDS` tokens whose probability the first edit changes
    most, largest change first. Cost: two reads of the trials.
    """
    position = trials[0].position

    def divergence(rows: EditedRows) -> Mapping[str, ArrayLike]:
        return {"kl": divergences(rows.native, rows.positions, rows.window).forward.numpy()}

    kl = lab.read(site, trials[:1], divergence, window)["kl"].iloc[0]
    offset = int(torch.as_tensor(kl).argmax())

    def probabilities(rows: EditedRows) -> Mapping[str, ArrayLike]:
        return {"p": rows.window[:, offset].float().softmax(-1).cpu().numpy()}

    edited = torch.from_numpy(np.stack(lab.read(site, trials, probabilities, window)["p"].to_list()))
    native = site.session.logits[0, position + offset].float().softmax(-1).cpu()
    words = (edited[0] - native).abs().topk(min(WORDS, len(native))).indices
    tokens = lab.tokens[site.sequence]
    conditions = ["native", *(str(trial.row["condition"]) for trial in trials)]
    rows = [
        (_sentence(lab, tokens, position, offset), offset, condition, _text(lab, [word]), float(p[word]))
        for condition, p in zip(conditions, [native, *edited], strict=True)
        for word in words.tolist()
    ]
    return pd.DataFrame(rows, columns=["text", "read_at", "condition", "word", "probability"])


def _sentence(lab: Lab, tokens: Tensor, position: int, offset: int) -> str:
    bar = position + offset + 1
    first, last = max(0, position - _BEFORE), min(len(tokens), bar + _AFTER)
    spans = (first, position, position + 1, bar, last)
    before, token, read, after = (_text(lab, tokens[i:j].tolist()) for i, j in itertools.pairwise(spans))
    return f"{'… ' if first else ''}{before}[{token}]{read}|{after}{' …' if last < len(tokens) else ''}"


def _text(lab: Lab, tokens: list[int]) -> str:
    plain = " ".join(map(str, tokens))
    return plain if lab.model.tokenizer is None or not tokens else str(lab.model.tokenizer.decode(tokens))
