"""From a dictionary and a text to the data of its pages."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.choices import at_least
from writesae.evaluations.substitution import Substitution
from writesae.experiment.at_firings import wide_firings
from writesae.experiment.conditions import REFERENCES, written_at
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import Firings, Integers, sample_firings
from writesae.experiment.lab import Lab
from writesae.experiment.quality import qualities
from writesae.page.atoms import data, measure
from writesae.page.atoms.measure import FINE, Atoms, Effects, Sweep, Trace
from writesae.page.atoms.text import TokenTexts, short

_BARS = 32
"""Most bars of a histogram."""

_AT_LEAST = {
    **dict.fromkeys(("min_firings", "top", "bands", "n_tokens", "min_token_count", "position_bins"), 1),
    **dict.fromkeys(("half_life_firings", "half_life_limit", "effect_horizon"), 1),
    **dict.fromkeys(("n_atoms", "per_band", "before", "after", "effect_firings", "substitution_firings"), 0),
    **dict.fromkeys(("n_nearest", "n_timelines"), 0),
}


@dataclass(frozen=True, kw_only=True)
class AtomPages:
    """What is shown of each atom, and from how many firings; every setting goes into the data.

    Raises:
        ValueError: a setting is out of range; the message names it and what was found.
    """

    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    n_atoms: int | None = 100
    """Atoms drawn uniformly from those with `min_firings` (and, where a substitution test is given, from those that it
    looked at). None or 0: all of them."""
    min_firings: int = 4
    """An atom with fewer firings on the tokens has no page."""
    top: int = 12
    """Contexts with the largest activations. A firing that another context already shows is passed over."""
    bands: int = 4
    """Equal shares of the firings, by activation, from which further contexts are drawn."""
    per_band: int = 3
    """Contexts drawn from each band."""
    before: int = 24
    """Tokens shown before a firing."""
    after: int = 10
    """Tokens shown after it."""
    n_tokens: int = 10
    """Tokens listed at each end of the key side and of the value side, and heads among the readers."""
    n_nearest: int = 6
    """Other atoms listed by the cosine with this one."""
    n_timelines: int = 3
    """Firings, of those that are followed, whose text is shown with what the head reads of the atom at each token."""
    min_token_count: int = 3
    """Tokens that occur less often in the evaluation text are left out of the key side."""
    position_bins: int = 16
    """Bins of the firing rate over positions."""
    half_life_firings: int = 10
    """Firings of an atom after which its write, and what the head reads of it, is followed."""
    half_life_limit: int = 128
    """Longest half-life that is looked for, in tokens."""
    effect_firings: int = 3
    """Firings of an atom, in as many sequences, at which its effect on the logits and on heads of later layers is
    measured. 0: not measured."""
    effect_horizon: int = 16
    """Effects are averaged over t..t+effect_horizon, both included, and so is the KL of the substitution test."""
    effect_step: float = 0.05
    """The derivative is a central difference of this step, in norms of the native write; its error falls with the
    square of the step."""
    substitution_firings: int = 4
    """Firings of an atom at which it takes the place of the model's own write, where no substitution test is given.
    0: none."""
    quality: bool = True
    """Measure the dictionary as a whole; it can take longer than all atoms together."""
    seed: int = 0
    """Seed of all draws."""
    label: str = ""
    """Name of the dictionary on the pages; by default the head and the target."""

    def __post_init__(self) -> None:
        at_least(self, _AT_LEAST)
        if not 0 < self.effect_step <= 1:
            raise ValueError(f"effect_step is a share of the write's norm in (0, 1], found {self.effect_step}")
        if self.atoms is not None and (not self.atoms or len(set(self.atoms)) != len(self.atoms)):
            raise ValueError(f"atoms are named once each, at least one of them, found {list(self.atoms)}")

    def collect(
        self,
        model: HookedRecurrent,
        sae: SAE,
        tokens: Tensor,
        *,
        substitution: Result | None = None,
        readers: Result | None = None,
        progress: bool = True,
    ) -> data.AtomPagesData:
        """What there is to see of each atom, on held-out text.

        Args:
            model: a hooked model with a tokenizer.
            sae: a dictionary of one of its heads.
            tokens: [N,T] evaluation sequences.
            substitution: result of the evaluation `substitution` for this dictionary, shown per atom: the test of the
                firing's own atom where there is one. None: a small test is run (`substitution_firings`).
            readers: result of the evaluation `readers` for this dictionary. None: readers are measured beside the
                effect on the logits.
            progress: show progress bars.

        Cost: one forward up to the layer per sequence for firings and one for cosines; per atom `half_life_firings`
        vector recurrences, `effect_firings` pairs of short edited runs and five for each of `substitution_firings`;
        then as `qualities`, if `quality` is set.

        Raises:
            ValueError: the SAE does not fit the model, the model has no tokenizer or one of another vocabulary, the
                tokens are not [N,T] with room for the effect's horizon, a result is about something else, or a
                hand-picked atom does not fire often enough.
            NothingToMeasureError: no atom fires often enough, or all are zero.
        """
        started = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            if tokens.ndim != 2 or tokens.shape[1] < self.effect_horizon + 2:
                raise ValueError(f"tokens must be [N,T] with T > {self.effect_horizon + 1}, found {list(tokens.shape)}")
            self.check(sae)
            lab = Lab(model, {self.label: sae}, tokens, seed=self.seed, progress=progress)
            substitution = _about(substitution, "substitution", lab.hook.name)
            readers = _about(readers, "readers", lab.hook.name)
            texts = TokenTexts(model)
            texts.check(tokens)
            evidence = self._measure(lab, texts, substitution, readers)
            pages = [_page(evidence, column) for column in range(len(evidence.atoms.number))]
            whole = qualities(lab) if self.quality else {}
            info = lab.describe(self.label) | {
                "settings": asdict(self),
                "quality": whole[self.label].to_dict() if whole else None,
                "seconds": round(time.perf_counter() - started, 2),
            }
        return data.AtomPagesData(info=json.loads(json.dumps(info)), atoms=pages)

    def check(self, sae: SAE) -> None:
        """ValueError where `atoms` names one that the dictionary does not have."""
        if beyond := [atom for atom in self.atoms or () if not 0 <= atom < int(sae.cfg.d_sae)]:
            raise ValueError(f"atoms: expected 0 to {int(sae.cfg.d_sae) - 1}, got {beyond}")

    def _measure(self, lab: Lab, texts: TokenTexts, substitution: Result | None, readers: Result | None) -> _Evidence:
        """Everything that the pages are made from."""
        firings, n_tokens = lab.firings(), lab.tokens.numel()
        frequent, alive = firings.alive(n_tokens, self.min_firings), firings.alive(n_tokens)
        lab.skipped["atoms with fewer firings than min_firings"] = len(alive) - len(frequent)
        tested = None if substitution is None else substituted(substitution)
        numbers = self._choose(firings, frequent, tested)
        matrices = lab.atoms(numbers)
        nonzero = matrices.norm() > 0
        lab.skipped["atoms that are zero"] = int((~nonzero).sum())
        lab.require(bool(nonzero.any()), f"all {len(numbers)} chosen atoms are zero matrices: there is nothing to show")
        atoms = Atoms.of(numbers[nonzero.cpu().numpy()], matrices.rows(nonzero))
        if tested is None and self.substitution_firings:
            tested = self._test(lab, atoms.number)
        last, per_atom = firings.n_positions - 2, self.half_life_firings
        followed = sample_firings(firings, atoms.number, per_atom, first=0, last=last, rng=lab.rng(2))
        table = _with_column(firings.frame(np.isin(firings.atom, atoms.number)), atoms)
        swept = measure.sweep(lab, atoms, table, _with_column(followed, atoms), self.half_life_limit)
        drawn = measure.effect_firings(lab, table, self.effect_horizon, self.effect_firings)
        measured = measure.effects(lab, atoms, drawn, self.effect_horizon, self.effect_step)
        shown = self._readers(readers, measured.changes.set_axis(atoms.number))
        lab.facts = {"n_alive": len(alive), "n_frequent": len(frequent)}  # not those of the small test
        tokens, direct = lab.tokens.cpu().numpy(), atoms.direct_path(lab)
        counts = np.bincount(firings.atom, minlength=firings.n_atoms)
        nearest = [
            [data.Neighbour(atom=atom, cosine=short(cosine), n_firings=int(counts[atom])) for atom, cosine in row]
            for row in atoms.nearest(lab, alive, self.n_nearest)
        ]
        return _Evidence(self, tokens, texts, atoms, nearest, swept, direct, measured, tested, shown)

    def _readers(self, result: Result | None, measured: pd.DataFrame) -> dict[int, data.Readers]:
        """Per atom its strongest readers: by the evaluation `readers`, beside a random direction of the atom's norm; or
        by `measured` [atoms,heads], beside the median over the other atoms."""
        if result is not None:
            places = ["layer", "mixer", "head"]
            means = result.tables["changes"].groupby(["condition", "atom", *places])["change"].mean().unstack(places)
            changes, typical = means.loc["atom"], means.loc["random"].reindex(means.loc["atom"].index)
            words = {"what": "as given", "typical": "a random direction of the same norm"}
        else:
            changes = measured.dropna(how="all")
            others = {atom: changes.drop(index=atom).median() for atom in changes.index}
            typical = pd.DataFrame(others, index=changes.columns).T
            unit, other = "per norm of the native write, to first order", "the other atoms shown (median)"
            words = {"what": unit, "typical": other}
        readers: dict[int, data.Readers] = {}
        for atom, change, usual in zip(
            changes.index, changes.to_numpy(float).tolist(), typical.to_numpy(float).tolist()
        ):
            heads: list[dict[str, object]] = []
            for i in np.argsort(np.negative(change), kind="stable").tolist()[: self.n_tokens]:  # NaN comes last
                if not np.isnan(change[i]):
                    layer, mixer, head = changes.columns[i]
                    known = {"change": short(change[i]), "typical": None if np.isnan(usual[i]) else short(usual[i])}
                    heads.append({"layer": int(layer), "mixer": mixer, "head": int(head), **known})
            readers[int(cast(int, atom))] = data.Readers.model_validate({"heads": heads, **words})
        return readers

    def _choose(self, firings: Firings, frequent: Integers, tested: Collection[int] | None) -> Integers:
        """The hand-picked atoms, or a draw from those that fire often enough (and were tested, if any were)."""
        text = f"{firings.n_sequences} sequences of {firings.n_positions} tokens"
        if self.atoms is not None:
            if missing := sorted(set(self.atoms) - set(frequent.tolist())):
                raise ValueError(
                    f"atoms {missing} have fewer than {self.min_firings} firings on {text} (the SAE has "
                    f"{firings.n_atoms} atoms, {len(frequent)} fire often enough); give more text, or lower min_firings"
                )
            return np.array(self.atoms)
        among = (
            frequent if tested is None else np.array([atom for atom in frequent.tolist() if atom in tested], dtype=int)
        )
        if len(among) == 0:
            raise NothingToMeasureError(
                f"no atom fires {self.min_firings} times on {text}"
                + ("" if tested is None else " and was looked at by the substitution test")
                + f": {len(firings)} firings, {len(frequent)} of {firings.n_atoms} atoms fire often enough; give more "
                "text, or lower min_firings"
            )
        n = min(self.n_atoms or len(among), len(among))
        return np.sort(np.random.default_rng(self.seed).choice(among, n, replace=False))

    def _test(self, lab: Lab, atoms: Integers) -> dict[int, list[data.Substituted]] | None:
        """A small substitution test at the atoms' own coefficients; None where no firing has room for the horizon."""
        firings, last = lab.firings(), lab.tokens.shape[1] - 1 - self.effect_horizon
        room = firings.atom[(firings.position >= 1) & (firings.position <= last)]
        if not len(testable := np.intersect1d(atoms, room)):
            return None
        test = Substitution(
            atoms=tuple(testable.tolist()),
            atom_choice=("own",),
            firings_per_atom=self.substitution_firings,
            scales=("coefficient",),
            controls=("random", "state"),
            horizon=self.effect_horizon,
            last_position_firings=0,
            alive_tokens=lab.tokens.numel(),
            mean_write_sequences=1,
            seed=self.seed,
        )
        return substituted(Result(test, lab.describe(), test.measure(lab)))


class _Evidence(NamedTuple):
    """All that the pages are made from."""

    settings: AtomPages
    tokens: Integers
    """[N,T]"""
    texts: TokenTexts
    atoms: Atoms
    nearest: list[list[data.Neighbour]]
    swept: Sweep
    direct: NDArray[np.float32]
    effects: Effects
    substitution: Mapping[int, list[data.Substituted]] | None
    readers: Mapping[int, data.Readers]


def _with_column(rows: pd.DataFrame, atoms: Atoms) -> pd.DataFrame:
    """With `column`, the place of each row's atom among the chosen ones."""
    place = {int(atom): column for column, atom in enumerate(atoms.number)}
    return rows.assign(column=np.array([place[atom] for atom in rows["atom"]], dtype=np.int64)).reset_index(drop=True)


# ---------------------------------------------------------------------------------------------- results of evaluations


def _about(result: Result | None, kind: str, hook_name: str) -> Result | None:
    """A result that was checked to be of this kind and hook; None where it holds no measurement."""
    if result is not None and (result.kind != kind or result.info["hook_name"] != hook_name):
        raise ValueError(
            f"{kind}= takes a result of the evaluation {kind!r} about {hook_name}, which the SAE reads; found one of "
            f"{result.kind!r} about {result.info['hook_name']}"
        )
    return None if result is None or result.skipped is not None else result


def substituted(result: Result) -> dict[int, list[data.Substituted]]:
    """The substitution test per written atom, one row for each scale: of the firing's own atom where that was tested,
    because a page is about that atom."""
    test = cast(Substitution, result.evaluation)
    wide = wide_firings(result, choice="own" if "own" in test.atom_choice else None)
    scales = [scale for scale in test.scales if f"atom/{scale}" in wide]
    pages: dict[int, list[data.Substituted]] = {}
    for atom, rows in wide.groupby("written_atom"):
        for scale in scales:
            controls = [name for name in written_at(scale, test.controls) if name not in REFERENCES]
            beats = {n: float((rows[f"{n}/{scale}"] < rows["delete"]).mean()) for n in ("atom", *controls)}
            best = max(controls, key=lambda name: beats[name], default=None)
            shown = {
                "scale": scale,
                "n": len(rows),
                "win_rate": beats["atom"],
                "median_kl": float(rows[f"atom/{scale}"].median()),
                "median_kl_delete": float(rows["delete"].median()),
                "best_control": best,
                "best_control_rate": beats[best] if best else None,
            }
            pages.setdefault(int(cast(int, atom)), []).append(data.Substituted.model_validate(shown))
    return pages


# ---------------------------------------------------------------------------------------------- one page


def _page(evidence: _Evidence, column: int) -> data.AtomPage:
    swept, atom = evidence.swept, int(evidence.atoms.number[column])
    rows = swept.table[swept.table["column"] == column]
    written = rows[rows["cosine"].notna()]
    n = swept.token_counts
    usual = np.flatnonzero(n >= evidence.settings.min_token_count)
    # v w^T and (-v)(-w)^T are one atom; the pages take the sign for which v agrees with the keys at its firings.
    sign = -1.0 if len(written) and float(written["key_cosine"].median()) < 0 else 1.0
    return data.AtomPage(
        atom=atom,
        terms=evidence.atoms.singular_terms(column, sign),
        nearest=evidence.nearest[column],
        n_firings=len(rows),
        rate=len(rows) / evidence.tokens.size,
        max_activation=float(rows["activation"].max()),
        mean_activation=float(rows["activation"].mean()),
        density=_histogram(rows["activation"].to_numpy(float), low=0.0),
        logits=_logits(evidence, column, sign),
        fires_on=_fires_on(evidence, rows),
        top=_top(evidence, rows),
        bands=list(_bands(evidence, rows)),
        positions=_positions(rows["position"].to_numpy(), evidence.tokens.shape, evidence.settings.position_bins),
        cosines=_cosines(written["cosine"].to_numpy(), swept.silent[column]) if len(written) else None,
        keys=data.Side(
            tokens=_ends(evidence, swept.token_ids[usual], sign * swept.key_means[column, usual], n[usual]),
            at_firings=_quartiles(sign * written["key_cosine"].to_numpy()),
        ),
        values=data.Side(
            tokens=_vocabulary(evidence, sign * evidence.direct[column]),
            at_firings=_quartiles(sign * written["value_cosine"].to_numpy()),
        ),
        effect=_effect(evidence, column, sign * evidence.direct[column]),
        memory=measure.memory([trace.life for trace in swept.traces[column]]),
        timelines=_timelines(evidence, swept.traces[column]),
        readers=evidence.readers.get(atom),
        substitution=None if evidence.substitution is None else evidence.substitution.get(atom, []),
    )


def _contexts(evidence: _Evidence, shown: pd.DataFrame, rows: pd.DataFrame) -> list[data.Context]:
    """A context for each firing of `shown`; `rows` has all firings of the atom."""
    tokens, settings = evidence.tokens, evidence.settings
    activations = np.zeros(tokens.shape)
    activations[rows["sequence"].to_numpy(), rows["position"].to_numpy()] = rows["activation"].to_numpy()
    contexts = []
    for sequence, position, cosine in zip(shown["sequence"].tolist(), shown["position"].tolist(), shown["cosine"]):
        first = max(0, position - settings.before)
        window = (sequence, slice(first, position + settings.after + 1))
        contexts.append(
            data.Context(
                sequence=sequence,
                position=position,
                first=first,
                tokens=evidence.texts.many(tokens[window]),
                activations=[short(value) for value in activations[window]],
                cosine=None if np.isnan(cosine) else short(cosine),
            )
        )
    return contexts


def _top(evidence: _Evidence, rows: pd.DataFrame) -> list[data.Context]:
    """Largest activations first; firings that a context already shows are passed over."""
    settings, chosen, seen = evidence.settings, list[int](), set[tuple[int, int]]()
    ordered = rows.sort_values("activation", ascending=False, kind="stable")
    for n, (sequence, position) in enumerate(zip(ordered["sequence"].tolist(), ordered["position"].tolist())):
        if (sequence, position) not in seen and len(chosen) < settings.top:
            chosen.append(n)
            seen |= {(sequence, t) for t in range(position - settings.before, position + settings.after + 1)}
    return _contexts(evidence, ordered.iloc[chosen], rows)


def _bands(evidence: _Evidence, rows: pd.DataFrame) -> Iterator[data.Band]:
    """Random contexts from equal shares of the firings, strongest share first."""
    n_bands, per_band = evidence.settings.bands, evidence.settings.per_band
    ordered = rows.sort_values("activation", kind="stable")
    rng = np.random.default_rng([evidence.settings.seed, int(rows["atom"].iloc[0])])
    edges = np.linspace(0, len(ordered), n_bands + 1).astype(int)
    for b in reversed(range(n_bands)):
        band = ordered.iloc[edges[b] : edges[b + 1]]
        if band.empty or not per_band:
            continue
        drawn = band.iloc[np.sort(rng.choice(len(band), min(per_band, len(band)), replace=False))[::-1]]
        yield data.Band(
            share_low=b / n_bands,
            share_high=(b + 1) / n_bands,
            low=short(band["activation"].min()),
            high=short(band["activation"].max()),
            contexts=_contexts(evidence, drawn, rows),
        )


def _fires_on(evidence: _Evidence, rows: pd.DataFrame) -> list[data.TokenValue]:
    """The tokens of most firings, with their share of the firings."""
    fired = evidence.tokens[rows["sequence"].to_numpy(), rows["position"].to_numpy()]
    ids, counts = np.unique(fired, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: evidence.settings.n_tokens]
    return _listed(evidence, ids[order], counts[order] / len(rows), counts[order])


def _listed(evidence: _Evidence, ids: Integers, values: NDArray[np.floating], n: Integers) -> list[data.TokenValue]:
    rows = zip(ids.tolist(), evidence.texts.many(ids), values.tolist(), n.tolist())
    return [data.TokenValue(token=token, text=text, value=short(value), n=k) for token, text, value, k in rows]


def _ends(evidence: _Evidence, ids: Integers, values: NDArray[np.floating], counts: Integers) -> data.Ends:
    n, order = min(evidence.settings.n_tokens, len(ids) // 2), np.argsort(-values, kind="stable")
    high, low = order[:n], order[len(order) - n :][::-1]
    return data.Ends(
        high=_listed(evidence, ids[high], values[high], counts[high]),
        low=_listed(evidence, ids[low], values[low], counts[low]),
    )


def _vocabulary(evidence: _Evidence, values: NDArray[np.float32]) -> data.Ends:
    """All tokens of the vocabulary by `values` [vocab]; rows of W_U that pad it are no tokens."""
    ids = np.arange(min(len(values), evidence.texts.size))
    return _ends(evidence, ids, values[: len(ids)], np.zeros_like(ids))


def _quartiles(values: ArrayLike) -> data.Quartiles | None:
    numbers = np.asarray(values, float)
    if not len(numbers):
        return None
    median, q25, q75 = (float(q) for q in np.quantile(numbers, (0.5, 0.25, 0.75)))
    return data.Quartiles(median=median, q25=q25, q75=q75, n=len(numbers))


def _histogram(values: NDArray[np.floating], low: float | None = None) -> data.Bars:
    """Shares of `values` in `_BARS` bars from `low` (None: the smallest) to the largest."""
    start, stop = float(values.min()) if low is None else low, float(values.max())
    counts, edges = np.histogram(values, _BARS, (start, stop if stop > start else start + 1))
    return data.Bars(edges=[short(x) for x in edges], values=[short(x) for x in counts / len(values)])


def _logits(evidence: _Evidence, column: int, sign: float) -> data.Bars:
    """Over the tokens of the vocabulary; by effect, or along the direct path where none was measured."""
    effect = evidence.effects.mean[column] if evidence.effects.n[column] else sign * evidence.direct[column]
    return _histogram(effect[: evidence.texts.size])


def _timelines(evidence: _Evidence, traces: Sequence[Trace]) -> data.Timelines | None:
    """Means over all followed firings; texts of the strongest of them."""
    if not traces:
        return None
    longest = max(len(trace.reads) for trace in traces)
    edges = [0, 1, *(2**i for i in range(1, 64) if 2**i < longest), longest]
    together = np.full((len(traces), longest), np.nan)
    for row, trace in zip(together, traces):
        row[: len(trace.reads)] = trace.reads
    lags = [short(float(np.nanmean(together[:, a:b]))) for a, b in itertools.pairwise(edges)]
    strongest = sorted(traces, key=lambda trace: -trace.activation)[: evidence.settings.n_timelines]
    width, firings = evidence.settings.before + evidence.settings.after, []
    for sequence, position, reads in ((t.sequence, t.position, t.reads[: width + 1]) for t in strongest):
        tokens = evidence.texts.many(evidence.tokens[sequence, position : position + len(reads)])
        shown = {"sequence": sequence, "position": position, "tokens": tokens, "reads": [short(x) for x in reads]}
        firings.append(data.Timeline.model_validate(shown))
    return data.Timelines(lags=data.Bars(edges=[float(x) for x in edges], values=lags), firings=firings)


def _positions(positions: Integers, shape: tuple[int, ...], bins: int) -> data.Bars:
    """Firing rate by position; bins are whole tokens."""
    edges = np.unique(np.linspace(0, shape[1], min(bins, shape[1]) + 1).astype(int))
    rates = np.histogram(positions, edges)[0] / (np.diff(edges) * shape[0])
    return data.Bars(edges=edges.astype(float).tolist(), values=rates.tolist())


def _cosines(at_firings: NDArray[np.float64], silent: Integers) -> data.Cosines:
    """Both histograms over the range where there is anything, in at most `_BARS` bars."""
    counts = np.histogram(np.clip(at_firings, -1, 1), FINE)[0]
    seen = np.flatnonzero(counts + silent)
    low, high = int(seen[0]) // 10 * 10, int(seen[-1]) // 10 * 10 + 10  # whole tenths
    merge = next(size for size in (1, 2, 5, 10) if (high - low) // size <= _BARS)
    edges = [round(float(FINE[i]), 2) for i in range(low, high + 1, merge)]

    def bars(fine: Integers) -> data.Bars:
        merged = fine[low:high].reshape(-1, merge).sum(1)
        return data.Bars(edges=edges, values=[round(float(x), 5) for x in merged / max(merged.sum(), 1)])

    quartiles = cast(data.Quartiles, _quartiles(at_firings))  # there are firings
    return data.Cosines(at_firings=quartiles, firings=bars(counts), silent=bars(silent))


def _effect(evidence: _Evidence, column: int, direct: NDArray[np.float32]) -> data.Effect | None:
    """None where it was not measured. The sign of an atom does not matter to its effect, but to the direct path."""
    mean, n = evidence.effects.mean[column], int(evidence.effects.n[column])
    if n == 0:
        return None
    varies = mean.std() > 0 and direct.std() > 0
    return data.Effect(
        tokens=_vocabulary(evidence, mean),
        direct_r=float(np.corrcoef(mean, direct)[0, 1]) if varies else None,
        size=float(mean.std()),
        n=n,
        horizon=evidence.settings.effect_horizon,
    )
