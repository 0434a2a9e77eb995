"""Detection: how well the tokens on which an atom fires predict where it fires in a text that it has not seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hookpoints import embedded
from writesae.experiment.terms import Terms
from writesae.experiment.tokens import sample_sequences
from writesae.use.features import CONTEXT, ONE, HeadTerms

QUICK = {"models": ("embedded",), "sequences": 12, "held_out": 4, "n_atoms": 16, "rows": 512, "least": 2}
NULL = "another atom's explanation"


def predicted(tokens: Tensor, fires: Tensor, new: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Firing rates at each token of a new text, and mean rates [F], from firings [B T,F] on tokens [B,T].

    The rate after a pair of tokens shrinks toward that of its second token, and this one toward the mean rate, by the
    weight of one firing."""

    def shrunk(group: Tensor, n: int, toward: Tensor) -> Tensor:
        counts = torch.zeros(n, fires.shape[1]).index_add_(0, group, fires)
        return (counts + toward) / (group.bincount(minlength=n)[:, None] + 1)

    def pairs(text: Tensor) -> Tensor:
        before = pad(text[:, :-1] + 1, (1, 0))  # 0 at the start of a sequence
        return (before * vocabulary + text).flatten()

    mean = fires.mean(0)
    of_token = shrunk(tokens.flatten(), vocabulary, mean)
    known, group = pairs(tokens).unique(return_inverse=True)
    of_pair = shrunk(group, len(known), of_token[known % vocabulary])
    asked = pairs(new)
    place = torch.searchsorted(known, asked).clamp_max(len(known) - 1)
    return torch.where((known[place] == asked)[:, None], of_pair[place], of_token[new.flatten()]), mean


def scores(rates: Tensor, mean: Tensor, fires: Tensor) -> dict[str, list[float]]:
    """Balanced accuracy and F1 of each atom, of rates [N,F] as predictions of firings [N,F]."""
    hits = fires.bool()
    n = fires.sum(0)
    # Balanced accuracy weighs firings and silence alike, so that its threshold is the base rate, and not 1/2.
    above = rates > mean
    likely = rates > 0.5
    balanced = ((above & hits).sum(0) / n + (~above & ~hits).sum(0) / (len(fires) - n)) / 2
    of_atoms = {"balanced accuracy": balanced, "F1": 2 * (likely & hits).sum(0) / (likely.sum(0) + n)}
    return {kind: [round(score, 3) for score in of_atom.tolist()] for kind, of_atom in of_atoms.items()}


def measure(
    models: tuple[str, ...] = ("embedded", "embedded-rwkv7"),
    sequences: int = 320,
    held_out: int = 160,
    n_atoms: int = 256,
    rows: int = 128_000,
    least: int = 10,
) -> dict[str, object]:
    """Scores of every atom that fires `least` times or more in both texts."""
    heads: dict[str, dict[str, object]] = {}
    for name in models:
        terms = HeadTerms(name, sequences, n_atoms, rows)
        test = sample_sequences(terms.model, embedded.text("test"), CONTEXT, held_out)
        tested = Terms(terms.model, test).writes(*terms.place)
        of_codes: dict[str, dict[str, list[float]]] = {}
        for label, features in terms.features().items():
            seen = (features.encode(terms.native.keys[:, 0], terms.native.values[:, 0]) != 0).float()
            new = (features.encode(tested.keys[:, 0], tested.values[:, 0]) != 0).float()
            often = (seen.sum(0) >= least) & (new.sum(0) >= least)
            rates, mean = predicted(terms.tokens, seen[:, often], test, terms.model.cfg.d_vocab)
            of_codes[label] = scores(rates, mean, new[:, often])
            if label == ONE:  # the same predictions, each compared with the next atom's firings
                of_codes[NULL] = scores(rates.roll(1, 1), mean.roll(1), new[:, often])
        heads[name] = terms.describe() | {"held out": len(tested), "codes": of_codes}
    return {"least": least, "heads": heads}
