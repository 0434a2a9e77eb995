"""What is measured of the atoms that get a page: one pass over the text, and edited runs at a few firings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.losses import read_queries
from writesae.experiment.downstream_heads import DownstreamHeads, downstream_heads, newest_outputs
from writesae.experiment.firings import Integers
from writesae.experiment.head import head_writes
from writesae.experiment.lab import EditedRows, Lab, Trial
from writesae.page.atoms.data import Memory, Term

Life: TypeAlias = tuple[int, bool]
"""Tokens after which less than half of a write's norm is left. If true, the sequence or the limit came first, and the
number is how far the write was followed."""
TERMS = 4
"""Most singular terms of an atom that are kept."""
FINE = np.linspace(-1, 1, 201)
"""Edges by which cosines are counted while the text goes by; figures merge them."""


class Atoms(NamedTuple):
    """The n atoms that get a page."""

    number: Integers
    matrices: LowRank
    terms: LowRank
    """The largest singular terms, at most `TERMS` of them."""
    v: Tensor
    """[n,K] unit key side of the leading term."""
    w: Tensor
    """[n,V] unit value side of the leading term."""

    @classmethod
    def of(cls, number: Integers, matrices: LowRank) -> Atoms:
        """From atoms that are not zero. For rank 1 the only term is the atom; otherwise they cost an SVD each."""
        terms = matrices if matrices.rank == 1 else LowRank.svd(matrices.dense(), TERMS)
        v, w = (normalize(side[:, 0], dim=-1) for side in (terms.keys, terms.values))
        return cls(number, matrices, terms, v, w)

    def singular_terms(self, column: int, sign: float) -> list[Term]:
        """The terms of one atom; `sign` turns both sides, which leaves the matrix as it is."""
        keys, values = self.terms.keys[column].double().cpu(), self.terms.values[column].double().cpu()
        sizes = keys.norm(dim=-1) * values.norm(dim=-1)
        whole = float(self.matrices.rows([column]).norm()) ** 2
        sides = (sign * normalize(keys, dim=-1), sign * normalize(values, dim=-1))
        return [
            Term(size=size, share=min(1.0, size**2 / whole), key=_rounded(key), value=_rounded(value))
            for size, key, value in zip(sizes.tolist(), *sides)
            if size > 1e-6 * float(sizes[0])
        ]

    def nearest(self, lab: Lab, among: Integers, n: int) -> list[list[tuple[int, float]]]:
        """Per atom the n of `among` with the largest cosine, itself left out: (atom, cosine).

        Cost: n F R R' (K + V) for F atoms `among`; atoms without factors are taken as flat matrices, n F K V.
        """
        chunks, mine = np.array_split(among, max(1, len(among) // 1024)), self.matrices
        if mine.rank > TERMS:
            flat, decoder = normalize(mine.dense().flatten(1), dim=-1), lab.sae.W_dec.detach()
            rows = (normalize(decoder[torch.from_numpy(part).to(decoder.device)].to(flat), dim=-1) for part in chunks)
            cosines = torch.cat([flat @ part.T for part in rows], 1)
        else:
            cosines = torch.cat([mine.cosines(lab.atoms(part)) for part in chunks], 1)
        cosines = cosines.cpu().numpy()
        rows = zip(self.number.tolist(), cosines, np.argsort(-cosines, kind="stable")[:, : n + 1])
        return [[(int(among[i]), float(row[i])) for i in order if among[i] != own][:n] for own, row, order in rows]

    @torch.no_grad()
    def direct_path(self, lab: Lab) -> NDArray[np.float32]:
        """w^T W_O^h W_U [n,vocab] for unit w, minus the mean over the vocabulary, to which probabilities are blind.

        The value side of the paper's formula (WriteSAE, arXiv 2605.12770): the gain and gate of the head's norm, later
        blocks and the final norm are not in it.
        """
        unembed = lab.model.W_U
        path = self.w.to(unembed) @ lab.model.layer_W_O(lab.hook.layer)[lab.hook.head].to(unembed) @ unembed
        return (path - path.mean(-1, keepdim=True)).float().cpu().numpy()


class Trace(NamedTuple):
    """What became of the write of one firing."""

    sequence: int
    position: int
    activation: float
    life: Life
    reads: NDArray[np.float64]
    """[S] `data.Timeline.reads` at the firing and the tokens after it."""


class Sweep(NamedTuple):
    """What one pass over the text gathers."""

    table: pd.DataFrame
    """Firings of the atoms, with the columns cosine, key_cosine, value_cosine; NaN where the native write is zero."""
    silent: Integers
    """[n,bins of FINE] cosines with the native write where the atom does not fire."""
    token_ids: Integers
    """[U] distinct tokens of the text."""
    token_counts: Integers
    """[U] their occurrences with a native write that is not zero."""
    key_means: NDArray[np.float64]
    """[n,U] mean cos(v, k_t) over these occurrences."""
    traces: list[list[Trace]]
    """Per atom, one for each firing that was followed."""


def sweep(lab: Lab, atoms: Atoms, table: pd.DataFrame, followed: pd.DataFrame, limit: int) -> Sweep:
    """What needs the keys and values of every token.

    Args:
        table: firings of the atoms, ordered by sequence: sequence, position, activation, and `column`, the place of the
            atom among `atoms`.
        followed: the firings after which the write is followed, for at most `limit` tokens; same columns.

    Cost: one forward up to the layer per sequence, 2 T n R (K + V) for cosines, and one vector recurrence per followed
    position.
    """
    ids, inverse = np.unique(lab.tokens.cpu().numpy(), return_inverse=True)
    inverse, n = inverse.reshape(lab.tokens.shape), len(atoms.number)
    sums, counts = torch.zeros(n, len(ids), dtype=torch.float64), np.zeros(len(ids), dtype=np.int64)
    silent, columns = np.zeros((n, len(FINE) - 1), dtype=np.int64), np.arange(n)[None]
    traces: list[list[Trace]] = [[] for _ in range(n)]
    cosines = np.full((3, len(table)), np.nan)
    bounds = np.searchsorted(table["sequence"].to_numpy(), np.arange(len(lab.tokens) + 1))
    for i in lab.bar(range(len(lab.tokens)), "atoms"):
        recurrence = lab.recurrence(i)
        writes = head_writes(recurrence, 0).to(atoms.v)
        matrix = writes.cosines(atoms.matrices)  # [T,n]
        key, value = (
            (normalize(native, dim=-1) @ side.T).mean(1)
            for native, side in ((writes.keys, atoms.v), (writes.values, atoms.w))
        )
        here, nonzero = slice(bounds[i], bounds[i + 1]), (writes.norm() > 0).cpu().numpy()
        where = table["position"].to_numpy()[here], table["column"].to_numpy()[here]
        for row, each in zip(cosines, (matrix, key, value)):
            row[here] = np.where(nonzero[where[0]], each.cpu().numpy()[where], np.nan)
        is_silent = np.repeat(nonzero[:, None], n, 1)
        is_silent[where] = False
        bins = np.clip(np.searchsorted(FINE, matrix.cpu().numpy(), side="right") - 1, 0, len(FINE) - 2)
        np.add.at(silent, (np.broadcast_to(columns, bins.shape), bins), is_silent)
        sums.index_add_(1, torch.from_numpy(inverse[i][nonzero]), key[torch.from_numpy(nonzero)].T.double().cpu())
        counts += np.bincount(inverse[i][nonzero], minlength=len(ids))
        for column, trace in follow(recurrence, atoms.matrices, followed[followed["sequence"] == i], limit):
            traces[column].append(trace)
    table = table.assign(cosine=cosines[0], key_cosine=cosines[1], value_cosine=cosines[2])
    return Sweep(table, silent, ids, counts, sums.numpy() / np.maximum(counts, 1), traces)


def follow(recurrence: Recurrence, atoms: LowRank, firings: pd.DataFrame, limit: int) -> Iterator[tuple[int, Trace]]:
    """Follow sum_r p_r(t) w_r^T from p_r = v_r at each firing, under decay and erase (closed loop): (column, trace).

    Args:
        recurrence: of the head alone, on the sequence of the firings.

    Cost: one pass of the head, and a vector recurrence for each position and term.
    """
    if firings.empty:
        return
    queries, total = read_queries(recurrence)[0, :, 0] * recurrence.scale, recurrence.outputs()[0, :, 0].norm(dim=-1)
    late = int(recurrence.read_before_write)  # the state after token t is read at token t + late
    for position, rows in firings.groupby("position"):
        start, columns = int(cast(int, position)), rows["column"].to_numpy()
        matrices, until = atoms.rows(torch.tensor(columns)), recurrence.select(tokens=slice(0, start + limit + 1))
        carried = until.propagate(matrices.keys.flatten(0, 1).to(until.dtype), start, 0)[0]  # [nR,S,K]
        keys = carried.unflatten(0, (len(columns), atoms.rank)).movedim(1, 2)  # [n,S,R,K]
        gram = (matrices.values @ matrices.values.mT).to(keys)[:, None]
        sizes = ((keys @ keys.mT) * gram).sum((-2, -1)).clamp_min(0).sqrt().cpu().numpy()
        length = keys.shape[1]
        read = (keys @ queries[start : start + length, :, None].to(keys))[..., 0]  # [n,S,R]
        read = ((read[..., None, :] @ gram)[..., 0, :] * read).sum(-1).clamp_min(0).sqrt()
        if late:
            read = torch.cat([torch.zeros_like(read[:, :1]), read[:, :-1]], 1)
        read = read / total[start : start + length].clamp_min(torch.finfo(total.dtype).tiny)
        for column, firing, size, share in zip(columns.tolist(), rows.itertuples(), sizes, read.double().cpu().numpy()):
            gone = np.flatnonzero(size < size[0] / 2)
            life = (int(gone[0]) if len(gone) else len(size) - 1, not len(gone))
            activation = float(cast(float, firing.activation))
            yield column, Trace(int(cast(int, firing.sequence)), start, activation, life, activation * share)


def memory(lives: Sequence[Life]) -> Memory:
    """Median over firings. Sequences end before some writes have faded, so it is the median of the Kaplan-Meier
    curve; leaving those firings out would make memories look short."""
    if not lives:
        return Memory(half_life=None, longest=0, ended=0, n=0)
    tokens, ended = (np.array(each) for each in zip(*lives))
    survival = stats.ecdf(stats.CensoredData.right_censored(tokens, ended)).sf
    below = survival.quantiles[survival.probabilities <= 0.5]
    half_life = float(below[0]) if len(below) else None
    return Memory(half_life=half_life, longest=int(tokens.max()), ended=int(ended.sum()), n=len(lives))


class Effects(NamedTuple):
    """Derivatives with respect to how much is written, for n atoms."""

    mean: NDArray[np.float32]
    """[n,vocab] of the logits: mean over firings and positions, minus the mean over the vocabulary."""
    n: Integers
    """[n] firings behind each."""
    changes: pd.DataFrame
    """Relative change of what the heads of later layers give, mean over firings: a row per atom, a column per (layer,
    mixer, head). NaN where none was measured."""


def effect_firings(lab: Lab, table: pd.DataFrame, horizon: int, per_atom: int) -> pd.DataFrame:
    """Up to `per_atom` firings of each atom, in different sequences, with room for the horizon.

    All atoms take sequences in one random order, so that few sequences serve all of them: each costs a forward.
    """
    rng = lab.rng(1)
    rows = table[table["position"] < lab.tokens.shape[1] - horizon]
    rows = rows.iloc[rng.permutation(len(rows))].drop_duplicates(["column", "sequence"])
    order = rng.permutation(int(table["sequence"].to_numpy().max()) + 1)
    rows = rows.assign(turn=order[rows["sequence"].to_numpy()]).sort_values("turn", kind="stable")
    return rows.groupby("column").head(per_atom).sort_values(["sequence", "position", "column"], ignore_index=True)


def effects(lab: Lab, atoms: Atoms, firings: pd.DataFrame, horizon: int, step: float) -> Effects:
    """d / d eps at eps = 0 where eps |W_t| A / |A| is added to the write, by central differences of `step`: of the
    logits, and of what every head of a later layer gives (norm of the derivative over t..t+horizon, over the norm of
    what it gives).

    Args:
        firings: as `effect_firings` draws them: at most one of an atom in a sequence.

    Firings at a zero write are left out. Cost: two edited rows of horizon + 1 tokens per firing.
    """
    n, mixers = len(atoms.number), downstream_heads(lab.model, lab.hook.layer)
    places = [(m.layer, m.mixer, head) for m in mixers for head in range(m.n_heads)]
    total = np.zeros((n, lab.model.W_U.shape[1]), dtype=np.float32)
    measured, changes = list[int](), list[NDArray[np.float64]]()
    native, raised = dict[DownstreamHeads, Tensor](), dict[int, list[Tensor]]()
    unit = atoms.matrices.with_norm(torch.ones_like(atoms.matrices.norm()))
    with newest_outputs(lab.model, mixers) as newest:

        def read(rows: EditedRows) -> Mapping[str, ArrayLike]:
            moved = rows.window.sub_(rows.native_window).float().mean(1)  # [n,vocab]
            for row, trial in enumerate(rows.trials):
                column, window = cast(int, trial.row["column"]), slice(trial.position, trial.position + rows.width)
                run = slice(window.start - rows.start, window.stop - rows.start)
                outputs = [moved[row], *(newest[m][row, run] for m in mixers)]
                if column not in raised:  # the first of a pair; a batch may end between them
                    raised[column] = outputs
                    continue
                logits, *heads = ((up - down) / (2 * step) for up, down in zip(raised.pop(column), outputs))
                total[column] += (logits - logits.mean()).cpu().numpy()
                measured.append(column)
                relative = [_relative(slope, native[m][0, window]) for slope, m in zip(heads, mixers)]
                changes.append(np.concatenate([np.empty(0), *relative]))
            return {}

        for site in lab.sites(firings, "effects"):
            native |= newest
            sizes, trials = site.writes.norm(), list[Trial]()
            for column, t in zip(site.rows["column"].tolist(), site.rows["position"].tolist()):
                if sizes[t] > 0:
                    added = unit.rows([column]).to(sizes) * (step * sizes[[t]])
                    trials += [Trial({"column": column}, t, lab.add(t, added * sign)) for sign in (1.0, -1.0)]
            if trials:
                lab.read(site, trials, read, horizon + 1)
    heads = pd.MultiIndex.from_tuples(places) if places else None
    each = pd.DataFrame(np.reshape(changes, (len(measured), len(places))), measured, heads)
    counts = np.bincount(np.array(measured, dtype=np.int64), minlength=n)
    total /= np.maximum(counts, 1)[:, None]
    return Effects(total, counts, each.groupby(level=0).mean().reindex(range(n)))


def _relative(slope: Tensor, native: Tensor) -> NDArray[np.float64]:
    """[H] norms of `slope` over those of `native`, both [W,H,V]; NaN where a head gives zero."""
    size = native.double().norm(dim=(0, 2))
    return (slope.double().norm(dim=(0, 2)) / size).where(size > 0, torch.nan).cpu().numpy()


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]
