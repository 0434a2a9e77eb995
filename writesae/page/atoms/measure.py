"""What is measured of the atoms that get a page: each fact once, when a page or an export first asks for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.losses import read_queries
from writesae.experiment.downstream_heads import DownstreamHeads, downstream_heads, newest_outputs
from writesae.experiment.firings import Integers, sample_firings
from writesae.experiment.head import head_writes
from writesae.experiment.lab import EditedRows, Lab, Trial
from writesae.files import Json
from writesae.page.atoms.settings import AtomSettings
from writesae.page.atoms.text import TokenTexts

TERMS = 4
"""Most singular terms of an atom that are kept."""
Life: TypeAlias = tuple[int, bool]
"""Tokens after which less than half of a write's norm is left. If true, the sequence or the limit came first, and the
number is how far the write was followed."""


class Trace(NamedTuple):
    """What became of the write of one firing."""

    sequence: int
    position: int
    activation: float
    life: Life
    reads: NDArray[np.float64]
    """[S] `data.Timeline.reads` at the firing and the tokens after it."""


class Effects(NamedTuple):
    """Derivatives with respect to how much is written, for n atoms."""

    mean: NDArray[np.float32]
    """[n,vocab] of the logits: mean over firings and positions, minus the mean over the vocabulary."""
    n: Integers
    """[n] firings behind each."""
    changes: pd.DataFrame
    """Relative change of what the heads of later layers give, mean over firings: a row per atom, a column per (layer,
    mixer, head). NaN where none was measured."""


class Facts:
    """The atoms of a dictionary that get a page, and what there is to know of them on held-out text.

    Args:
        settings: which atoms, from how many firings.
        model: a hooked model with a tokenizer.
        sae: a dictionary of one of its heads.
        tokens: [N,T] evaluation sequences.
        among: atoms that a draw is from. None: all that fire often enough.
        progress: show progress bars.

    Cost: one forward up to the layer per sequence.

    Raises:
        ValueError: the SAE does not fit the model, the model has no tokenizer or one of another vocabulary, the
            tokens are not [N,T] with room for the effect's horizon, or a hand-picked atom does not fire often enough.
        NothingToMeasureError: no atom fires often enough, or all are zero.
    """

    @torch.no_grad()
    def __init__(
        self,
        settings: AtomSettings,
        model: HookedRecurrent,
        sae: SAE,
        tokens: Tensor,
        *,
        among: Collection[int] | None = None,
        progress: bool = True,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < settings.effect_horizon + 2:
            raise ValueError(f"tokens: expected [N,T] with T > {settings.effect_horizon + 1}, got {list(tokens.shape)}")
        settings.check(sae)
        self.settings, self.texts = settings, TokenTexts(model)
        self.lab = lab = Lab(model, {settings.label: sae}, tokens, seed=settings.seed, progress=progress)
        self.texts.check(tokens)
        self.ids, self.firings = tokens.cpu().numpy(), lab.firings()
        self.alive, rare = self.firings.alive(tokens.numel()), f"{settings.min_firings} firings on this text"
        often = self.firings.alive(tokens.numel(), settings.min_firings)
        self.counts: dict[str, Json] = {"n_alive": len(self.alive), "n_frequent": len(often)}
        lab.skipped["atoms with fewer firings than min_firings"] = len(self.alive) - len(often)
        if missing := sorted(set(settings.atoms or ()) - set(often.tolist())):
            raise ValueError(f"atoms: expected {rare}, got fewer of {missing}; give more text, or lower min_firings")
        if among is not None:
            often, rare = np.intersect1d(often, list(among)), f"{rare} and was tested"
        lab.require(len(often) > 0 or bool(settings.atoms), f"no atom has {rare}; give more text, or lower min_firings")
        n = min(settings.n_atoms or len(often), len(often))
        drawn = np.random.default_rng(settings.seed).choice(often, n, replace=False)
        chosen = np.sort(drawn) if settings.atoms is None else np.array(settings.atoms)
        nonzero = (lab.atoms(chosen).norm() > 0).cpu().numpy()
        lab.skipped["atoms that are zero"] = int((~nonzero).sum())
        lab.require(bool(nonzero.any()), f"all {len(chosen)} chosen atoms are zero matrices: there is nothing to show")
        self.number: Integers = chosen[nonzero]
        """The n atoms."""
        self.place = {int(atom): column for column, atom in enumerate(self.number)}
        self.matrices = lab.atoms(self.number)

    @cached_property
    def terms(self) -> LowRank:
        """The largest singular terms, at most `TERMS` of them. For rank 1 the only term is the atom; otherwise they
        cost an SVD each."""
        return self.matrices if self.matrices.rank == 1 else LowRank.svd(self.matrices.dense(), TERMS)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """[n,K] and [n,V] unit key and value side of the leading term."""
        return normalize(self.terms.keys[:, 0], dim=-1), normalize(self.terms.values[:, 0], dim=-1)

    @cached_property
    def nearest(self) -> list[list[tuple[int, float]]]:
        """Per atom the alive atoms with the largest cosine, itself left out: atom, cosine.

        Cost: n F R R' (K + V) for F alive atoms; atoms without factors are taken as flat matrices, n F K V.
        """
        mine, parts = self.matrices, np.array_split(self.alive, -(-len(self.alive) // 1024))
        if mine.rank <= TERMS:
            each = [mine.cosines(self.lab.atoms(part)) for part in parts]
        else:  # the factors of a decoder without factors would cost an SVD each
            flat, decoder = normalize(mine.dense().flatten(1), dim=-1), self.lab.sae.W_dec.detach()
            each = [flat @ normalize(decoder[torch.from_numpy(part)].to(flat), dim=-1).T for part in parts]
        cosines = torch.cat(each, 1).cpu().numpy()
        cosines[self.number[:, None] == self.alive] = -np.inf
        best = np.argsort(-cosines, kind="stable")[:, : min(self.settings.n_nearest, len(self.alive) - 1)]
        return [[(int(self.alive[i]), float(row[i])) for i in order] for row, order in zip(cosines, best)]

    @cached_property
    def direct(self) -> NDArray[np.float32]:
        """w^T W_O^h W_U [n,vocab] for unit w, minus the mean over the vocabulary, to which probabilities are blind.

        The value side of the paper's formula (WriteSAE, arXiv 2605.12770): the gain and gate of the head's norm, later
        blocks and the final norm are not in it.
        """
        hook, unembed = self.lab.hook, self.lab.model.W_U
        path = self.sides[1].to(unembed) @ self.lab.model.layer_W_O(hook.layer)[hook.head].to(unembed) @ unembed
        return (path - path.mean(-1, keepdim=True)).float().cpu().numpy()

    @cached_property
    def swept(self) -> tuple[LowRank, list[list[Trace]]]:
        """The N T native writes of the text, and per atom a trace for each firing that is followed, for at most
        `half_life_limit` tokens.

        Cost: one forward up to the layer per sequence, and one vector recurrence for each firing that is followed;
        memory N T (K + V) floats.
        """
        lab, settings, last = self.lab, self.settings, self.ids.shape[1] - 2
        writes, traces = list[LowRank](), [list[Trace]() for _ in self.number]
        per_atom, rng = settings.half_life_firings, lab.rng(2)
        followed = sample_firings(self.firings, self.number, per_atom, first=0, last=last, rng=rng)
        for i in lab.bar(range(len(self.ids)), "atoms"):
            recurrence = lab.recurrence(i)
            native, total = head_writes(recurrence, 0).to(self.sides[0]), recurrence.outputs()[0, :, 0].norm(dim=-1)
            writes.append(LowRank(native.keys.clone(), native.values.clone()))  # not views of the whole layer
            own = followed[followed["sequence"] == i][["atom", "position", "activation"]]
            for atom, t, activation in own.itertuples(index=False, name=None):
                until = recurrence.select(tokens=slice(0, t + settings.half_life_limit + 1))
                left, reads = follow(until, self.matrices.rows([self.place[atom]]), t)
                gone = (left < left[0] / 2).nonzero()
                life = (int(gone[0]) if len(gone) else len(left) - 1, not len(gone))
                share = reads / total[t : t + len(reads)].clamp_min(torch.finfo(total.dtype).tiny)
                shares = activation * share.double().cpu().numpy()
                traces[self.place[atom]].append(Trace(i, t, activation, life, shares))
        return LowRank(torch.cat([w.keys for w in writes]), torch.cat([w.values for w in writes])), traces

    def cosines(self, column: int) -> NDArray[np.float64]:
        """[3,N T] signed cosines of one atom with every native write: of the matrices, of the key sides and of the
        value sides (mean over the terms of a write); NaN where the native write is zero."""
        writes = self.swept[0]
        pairs = zip((writes.keys, writes.values), self.sides)
        sides = [(normalize(native, dim=-1) @ own[column]).mean(-1) for native, own in pairs]
        cosines = torch.stack([writes.cosines(self.matrices.rows([column]))[:, 0], *sides])
        return cosines.where(writes.norm() > 0, torch.nan).double().cpu().numpy()

    def sign(self, column: int) -> float:
        """v w^T and (-v)(-w)^T are one atom; the pages take the sign for which v agrees with keys at its firings."""
        return -1.0 if pd.Series(self.cosines(column)[1][self.spots(column)]).median() < 0 else 1.0

    def rows(self, column: int) -> pd.DataFrame:
        """The firings of one atom: sequence, position, atom, activation."""
        return self.firings.frame(self.firings.atom == self.number[column])

    def spots(self, column: int) -> Integers:
        """The firings of one atom as places in the N T tokens of the text."""
        places = self.firings.sequence * self.ids.shape[1] + self.firings.position
        return places[self.firings.atom == self.number[column]]

    def change(self, column: int) -> NDArray[np.float32]:
        """[vocab] change of the logits by effect, or along the direct path where no effect was measured."""
        measured = self.effects
        return measured.mean[column] if measured.n[column] else self.sign(column) * self.direct[column]

    @cached_property
    def effects(self) -> Effects:
        """d / d eps at eps = 0 where eps |W_t| A / |A| is added to the write, by central differences of `effect_step`:
        of the logits, and of what every head of a later layer gives (norm of the derivative over t..t+horizon, over
        the norm of what it gives).

        Cost: two edited rows of horizon + 1 tokens per firing. Firings at a zero write are left out.
        """
        lab, settings, n = self.lab, self.settings, len(self.number)
        mixers = downstream_heads(lab.model, lab.hook.layer)
        places = [(m.layer, m.mixer, head) for m in mixers for head in range(m.n_heads)]
        total = np.zeros((n, lab.model.W_U.shape[1]), dtype=np.float32)
        measured, changes = list[int](), list[NDArray[np.float64]]()
        native, raised = dict[DownstreamHeads, Tensor](), dict[int, list[Tensor]]()
        unit = self.matrices.with_norm(torch.ones_like(self.matrices.norm()))
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
                    pairs = zip(raised.pop(column), outputs)
                    logits, *heads = ((up - down) / (2 * settings.effect_step) for up, down in pairs)
                    total[column] += (logits - logits.mean()).cpu().numpy()
                    measured.append(column)
                    relative = [_relative(slope, native[m][0, window]) for slope, m in zip(heads, mixers)]
                    changes.append(np.concatenate([np.empty(0), *relative]))
                return {}

            for site in lab.sites(self.drawn(), "effects"):
                native |= newest
                steps, trials = settings.effect_step * site.writes.norm(), list[Trial]()
                for column, t in zip(map(self.place.__getitem__, site.rows["atom"]), site.rows["position"].tolist()):
                    if steps[t] > 0:
                        added = unit.rows([column]).to(steps) * steps[[t]]
                        trials += [Trial({"column": column}, t, lab.add(t, added * sign)) for sign in (1.0, -1.0)]
                if trials:
                    lab.read(site, trials, read, settings.effect_horizon + 1)
        heads = pd.MultiIndex.from_tuples(places) if places else None
        each = pd.DataFrame(np.reshape(changes, (len(measured), len(places))), measured, heads)
        counts = np.bincount(np.array(measured, dtype=np.int64), minlength=n)
        total /= np.maximum(counts, 1)[:, None]
        return Effects(total, counts, each.groupby(level=0).mean().reindex(range(n)))

    def drawn(self) -> pd.DataFrame:
        """Up to `effect_firings` firings of each atom, in different sequences, with room for the horizon.

        All atoms take sequences in one random order, so that few sequences serve all of them: each costs a forward.
        """
        rng, table = self.lab.rng(1), self.firings.frame(np.isin(self.firings.atom, self.number))
        rows = table[table["position"] < self.ids.shape[1] - self.settings.effect_horizon]
        rows = rows.iloc[rng.permutation(len(rows))].drop_duplicates(["atom", "sequence"])
        order = rng.permutation(int(table["sequence"].to_numpy().max()) + 1)
        rows = rows.iloc[np.argsort(order[rows["sequence"].to_numpy()], kind="stable")]
        return rows.groupby("atom").head(self.settings.effect_firings).sort_values(["sequence", "position", "atom"])


def _relative(slope: Tensor, native: Tensor) -> NDArray[np.float64]:
    """[H] norms of `slope` over those of `native`, both [W,H,V]; NaN where a head gives zero."""
    size = native.double().norm(dim=(0, 2))
    return (slope.double().norm(dim=(0, 2)) / size).where(size > 0, torch.nan).cpu().numpy()


def follow(recurrence: Recurrence, atom: LowRank, start: int) -> tuple[Tensor, Tensor]:
    """What becomes of an atom (N = 1) that is written at token `start`, under decay and erase (closed loop): from there
    on, [S] the norm of what is left, and [S] the size of what the head reads of it.

    Args:
        recurrence: of the head alone, on the sequence.

    Cost: a vector recurrence for each term.
    """
    keys = recurrence.propagate(atom.keys[0].to(recurrence.dtype), start, 0)[0].movedim(0, 1)  # [S,R,K]
    left = LowRank(keys, atom.values.to(keys).expand(len(keys), -1, -1))
    queries = (read_queries(recurrence)[0, start:, 0] * recurrence.scale).to(keys)
    read = ((keys @ queries[..., None])[..., 0] @ left.values[0]).norm(dim=-1)
    if recurrence.read_before_write:  # the state after token t is read at token t + 1
        read = torch.cat([torch.zeros_like(read[:1]), read[:-1]])
    return left.norm(), read
