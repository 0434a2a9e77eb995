"""What an atom moves alone, and at which tokens it fires: statistics of selectivity.

The paper's selectivity (I.1, figures 9 and 10) is of directions: 1 - overlap of the K tokens that an edit moves most
with those that a random direction of its norm moves. It says itself that any direction scores above 0.99, because two
random sets of 32 tokens in a large vocabulary hardly meet. `own_tokens` is this project's: how far the firings of an
atom are at one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import Firings, Integers
from writesae.experiment.head import matrices_of
from writesae.experiment.lab import EditedRows, Lab, Readout, Site, Trial
from writesae.experiment.reconstruction import ATOM, of_dictionary
from writesae.verdict.finding import Against, Finding, Paired

RELEVANT_SHARE = 0.1
"""Excess of the share of firings at one token from which on it matters."""
RELEVANT_SELECTIVITY = 0.01
"""Difference of two selectivities that matters. The paper's 47 heads lie between 0.96 and 1."""
OWN_TOKENS: dict[str, str] = {
    "atom": "atom that fires often enough",
    "firings": "number of its firings",
    "token": "the most frequent token among them",
    "share": "share of this token among the firings",
    "chance": "the same share for as many random positions",
}
"""Columns of `own_tokens`."""
SELECTIVITY: dict[str, str] = {
    "sae": "label of the dictionary",
    "sequence": "row of the evaluation tokens",
    "position": "token t at which the strongest atom is added",
    "selectivity": "1 - overlap of the tokens that it moves most with those of a random direction",
    "chance": "the same of a second random direction",
}
"""Columns of `direction_selectivity`."""


class Places(NamedTuple):
    """The places (tokens) of some sequences, and the firings there."""

    labels: NDArray[np.int64]
    """Token of each place, all sequences in one."""
    atom: NDArray[np.int64]
    """Atom of each firing."""
    label: NDArray[np.int64]
    """Token at each firing."""
    n_atoms: int


class Alignment(NamedTuple):
    """How well each of F atoms fires where a token is."""

    both: NDArray[np.int64]
    """[F] firings at the token."""
    fired: NDArray[np.int64]
    """[F] firings."""
    present: int
    """Places of the token."""
    phi: NDArray[np.float64]
    """[F] correlation of firing and token; 0 where one of them never or always is."""


def moved_tokens(k: int) -> Readout:
    """Readout: `moved` [k], the tokens whose log-probability changes most, up or down, at the edited token."""

    def read(rows: EditedRows) -> Mapping[str, Integers]:
        change = rows.window[:, 0].log_softmax(-1) - rows.native_window[:, 0].log_softmax(-1)
        return {"moved": change.abs().topk(min(k, change.shape[1])).indices.cpu().numpy()}

    return read


def direction_selectivity(
    lab: Lab, site: Site, positions: list[int], atoms: Mapping[str, LowRank], k: int
) -> pd.DataFrame:
    """1 - |top k of a direction and top k of a random one| / k at some positions of one sequence, where each direction
    is added to the write at the norm of the native write (the paper's eps = 1).

    Args:
        atoms: for each dictionary the atom at each position; those that are zero are left out.

    Returns: columns sae, sequence, position, selectivity, chance: the same of a second random direction of the rank of
    the first dictionary's atoms, which is what a direction without any meaning has.

    Cost: an edited row of one token for each direction and position, two of them random.
    """
    native, first = site.at(positions), next(iter(atoms.values()))
    generator = torch.Generator().manual_seed(int(lab.rng(13, site.sequence).integers(2**62)))
    directions = {"random": first.random_like(generator), "other": first.random_like(generator)}
    directions |= {f"atom {label}": atom for label, atom in atoms.items()}
    trials = []
    for name, direction in directions.items():
        size = direction.norm()
        for n, t in enumerate(positions):
            if size[n] > 0:
                added = direction.rows([n]) * (native.norm()[n] / size[n])
                trials.append(Trial({"name": name, "position": t}, t, lab.add(t, added)))
    moved = lab.read(site, trials, moved_tokens(k), 1).set_index(["name", "position"])["moved"]
    rows = []
    for label in atoms:
        for t in positions:
            if (f"atom {label}", t) in moved.index:
                random = set(moved["random", t])
                alike = {name: len(random & set(moved[name, t])) / len(random) for name in (f"atom {label}", "other")}
                rows.append((label, site.sequence, t, 1 - alike[f"atom {label}"], 1 - alike["other"]))
    return pd.DataFrame(rows, columns=list(SELECTIVITY))


def of_strongest(lab: Lab, site: Site, positions: list[int], k: int) -> pd.DataFrame:
    """`direction_selectivity` of the strongest atom of each dictionary of the laboratory; no rows without positions."""
    if not positions:
        return pd.DataFrame()
    native, atoms = site.at(positions), {}
    for label, hook in lab.hooks.items():
        matrices = matrices_of(site.recurrence, hook.target)[positions]
        atoms[label] = of_dictionary(lab, label, matrices, native)[ATOM]
    return direction_selectivity(lab, site, positions, atoms, k)


def own_tokens(firings: Firings, tokens: Tensor, min_firings: int, rng: np.random.Generator) -> pd.DataFrame:
    """For each atom with at least `min_firings` firings on tokens [N,T]: the most frequent token among its firings, its
    `share` of them, and `chance`, the same share for as many positions drawn at random. Cost: a pass over the firings.
    """
    ids = tokens.cpu().numpy().ravel()
    places = firings.sequence * firings.n_positions + firings.position
    order = np.argsort(firings.atom, kind="stable")
    atoms, starts = np.unique(firings.atom[order], return_index=True)
    rows = []
    for atom, of_atom in zip(atoms.tolist(), np.split(places[order], starts[1:])):
        if len(of_atom) >= min_firings:
            token, share = _most_frequent(ids[of_atom])
            _, chance = _most_frequent(ids[rng.choice(len(ids), len(of_atom), replace=False)])
            rows.append((atom, len(of_atom), token, share, chance))
    return pd.DataFrame(rows, columns=list(OWN_TOKENS))


def _most_frequent(ids: Integers) -> tuple[int, float]:
    values, counts = np.unique(ids, return_counts=True)
    best = int(counts.argmax())
    return int(values[best]), float(counts[best] / len(ids))


def places_of(
    firings: Firings, tokens: Tensor, sequences: NDArray[np.int64], aligned: Literal["current", "next"]
) -> Places:
    """The places of some sequences; the label of a place is its token, or the next one."""
    ids = tokens.cpu().numpy()
    labels = ids if aligned == "current" else ids[:, 1:]
    there = firings.of_sequences(sequences)
    inside = there.position < labels.shape[1]
    at = labels[there.sequence[inside], there.position[inside]]
    return Places(labels[sequences].ravel(), there.atom[inside], at, there.n_atoms)


def alignment(places: Places, token: int) -> Alignment:
    """Correlation (phi) of every atom's firing with a token."""
    fired = np.bincount(places.atom, minlength=places.n_atoms)
    both = np.bincount(places.atom[places.label == token], minlength=places.n_atoms)
    n, present = len(places.labels), int((places.labels == token).sum())
    scale = np.sqrt(fired.astype(float) * (n - fired) * present * (n - present))
    phi = np.where(scale > 0, (both * float(n) - fired * float(present)) / np.maximum(scale, 1), 0.0)
    return Alignment(both, fired, present, phi)


def own_token(result: Result, labels: Sequence[str | None]) -> Finding:
    """Whether atoms fire on a token of their own: the table of `own_tokens` with the `labels` of a WriteSAE and of a
    FlatSAE, its control; None where there is none."""
    claim, table = "atoms fire on a token of their own more than chance has it", result.tables["own_tokens"]
    table, own = table.assign(excess=table["share"] - table["chance"]), {}
    for name, label in zip(("WriteSAE", "FlatSAE"), labels):
        rows = table[table["sae"] == label]
        if len(rows) > 1:
            own[name] = Paired(rows, ("atom",), result.evaluation.seed)
    if "WriteSAE" not in own:
        return Finding.untested(claim, "It needs a WriteSAE with two atoms or more that fire often enough.")
    against = {name: Against(own["WriteSAE"].lead("excess", other)) for name, other in own.items()}
    against.pop("WriteSAE")
    return Finding(
        claim=claim,
        effect=own["WriteSAE"].median("excess"),
        what="the excess over chance",
        against=against,
        relevant=RELEVANT_SHARE,
        shown={name: each.median("excess") for name, each in own.items()},
        write="{:+.2f}".format,
        axis="median share of the most frequent token minus chance",
        controls="" if against else "no FlatSAE with as many atoms was given",
        of="atoms",
    )


def selective(result: Result, label: str | None, k: int) -> Finding:
    """Claim 28, from the table of `direction_selectivity` and the label of a WriteSAE."""
    claim, table = "an atom moves other tokens than a random direction of its norm", result.tables["selectivity"]
    rows = table[table["sae"] == label]
    if len(rows) < 2:
        return Finding.untested(claim, "It needs a WriteSAE whose atoms fire at two positions or more.", 28)
    moved = Paired(rows, seed=result.evaluation.seed)
    lead = moved.mean("selectivity", "chance")
    return Finding(
        number=28,
        claim=claim,
        effect=lead,
        what="the lead over a direction without meaning",
        relevant=RELEVANT_SELECTIVITY,
        shown=moved.means({"selectivity": "atom", "chance": "a second random direction"}),
        write="{:.4f}".format,
        axis=f"selectivity at K = {k}",
        measured=f"lead {lead}",
        controls=f"two random sets of tokens {1 - k / result.fact('d_vocab'):.4f}",
        of="positions in {} sequences",
    )
