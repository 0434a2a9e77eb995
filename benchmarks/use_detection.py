"""Detection: how well the tokens on which an atom fires predict where it fires in a text that it has not seen."""

from __future__ import annotations

from typing import Any

import torch
import use
from torch import Tensor

from writesae.verdict.statistics import estimate_difference

QUICK = {"models": ("embedded",), "sequences": 12, "held_out": 4, "n_atoms": 16, "rows": 512, "least": 2}
NULL = "another atom's explanation"
INTRODUCTION = """The explanation of an atom is its firing rate after each token pair of the training text. Rates of
pairs shrink toward those of the second token, and these toward the mean rate, by the weight of one firing. The
explanation then predicts the firings on held-out text. Balanced accuracy is that of the rule "fires where its rate is
above its mean rate"; chance is 0.5. F1 is that of the rule "fires where its rate is above one half". Scores are means
over the atoms that fire {least} times or more in both texts, with 95% intervals over atoms. "Covered" is the share of
atoms that do so. "F1 of all atoms" is 0 for the others. The row "{null}" gives each atom of the first
dictionary the explanation of its neighbor: a null. A code of a quantizer fires with a gain of either sign, an atom of
WriteSAE with a positive one, so scores of several active atoms are not strictly on equal terms."""


def predicted(tokens: Tensor, fires: Tensor, new: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Firing rates at each token of a new text, and mean rates [F], from firings [B T,F] on tokens [B,T]."""

    def shrunk(group: Tensor, n: int, toward: Tensor) -> Tensor:
        counts = torch.zeros(n, fires.shape[1]).index_add_(0, group, fires)
        return (counts + toward) / (group.bincount(minlength=n)[:, None] + 1)

    before = (torch.nn.functional.pad(x[:, :-1] + 1, (1, 0)) for x in (tokens, new))  # 0 at the start of a sequence
    seen, asked = ((b * vocabulary + x).flatten() for b, x in zip(before, (tokens, new)))
    of_token = shrunk(tokens.flatten(), vocabulary, fires.mean(0))
    known, group = seen.unique(return_inverse=True)
    of_pair = shrunk(group, len(known), of_token[known % vocabulary])
    at = torch.searchsorted(known, asked).clamp_max(len(known) - 1)
    return torch.where((known[at] == asked)[:, None], of_pair[at], of_token[new.flatten()]), fires.mean(0)


def scores(rates: Tensor, mean: Tensor, fires: Tensor) -> dict[str, list[float]]:
    """Balanced accuracy and F1 of each atom, of rates [N,F] as predictions of firings [N,F]."""
    hits, n, above, likely = fires.bool(), fires.sum(0), rates > mean, rates > 0.5
    balanced = ((above & hits).sum(0) / n + (~above & ~hits).sum(0) / (len(fires) - n)) / 2
    found = {"balanced accuracy": balanced, "F1": 2 * (likely & hits).sum(0) / (likely.sum(0) + n)}
    return {kind: [round(x, 3) for x in each.tolist()] for kind, each in found.items()}


def measure(
    models: tuple[str, ...] = ("embedded", "embedded-rwkv7"),
    sequences: int = 320,
    held_out: int = 160,
    n_atoms: int = 256,
    rows: int = 128_000,
    least: int = 10,
) -> dict[str, Any]:
    """Scores of every atom."""
    found: dict[str, Any] = {"least": least, "heads": {}}
    for name in models:
        terms = use.Terms(name, sequences, n_atoms, rows)
        test = use.sample_sequences(terms.model, use.embedded.text("test"), use.CONTEXT, held_out)
        writes, head = [x.writes(*terms.place) for x in (terms, use.terms.Terms(terms.model, test))], {}
        for label, code in terms.codes().items():
            sides = ((each.keys[:, 0], each.values[:, 0]) for each in writes)
            seen, new = ((code.encode(*each) != 0).float() for each in sides)
            kept = (seen.sum(0) >= least) & (new.sum(0) >= least)
            rates, mean = predicted(terms.tokens, seen[:, kept], test, terms.model.cfg.d_vocab)
            head[label] = scores(rates, mean, new[:, kept])
            if label == next(iter(use.RIVALS)):
                head[NULL] = scores(rates.roll(1, 1), mean.roll(1), new[:, kept])
        found["heads"][name] = terms.describe() | {"held out": len(writes[1]), "codes": head}
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The section of the page."""
    parts = [INTRODUCTION.format(least=found["least"], null=NULL)]
    for name, head in found["heads"].items():
        left = {label: [0.0] * (head["atoms"] - len(of["F1"])) for label, of in head["codes"].items()}
        codes = {label: of | {"F1 of all atoms": of["F1"] + left[label]} for label, of in head["codes"].items()}
        cells = (
            [label, *(use.told(use.over(x)) for x in of.values()), f"{1 - len(left[label]) / head['atoms']:.0%}"]
            for label, of in codes.items()
        )
        gains = {
            (ours, theirs): {
                kind: estimate_difference(x, y, range(len(x)), range(len(y)))
                for kind, x, y in ((kind, codes[ours][kind], codes[theirs][kind]) for kind in codes[ours])
            }
            for ours, theirs in use.PAIRS
        }
        parts += [use.HEADING.format(name=name, **head) + f", {head['held out']:,} held-out writes"]
        parts += [use.table(("code", *codes[NULL], "covered"), cells), use.differences(gains)]
    return parts
