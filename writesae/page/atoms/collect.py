"""From a dictionary and a text to the data of its pages."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sae_lens import SAE
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.target import HeadHook
from writesae.evaluations.substitution import Substitution
from writesae.experiment.at_firings import wide_firings
from writesae.experiment.conditions import REFERENCES
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import Integers
from writesae.experiment.quality import qualities
from writesae.page.atoms import data, parts
from writesae.page.atoms.measure import Facts, Life, Trace
from writesae.page.atoms.settings import AtomSettings
from writesae.page.atoms.text import short

_FINE = np.linspace(-1, 1, 201)
"""Edges by which cosines are counted; figures merge them."""


@dataclass(frozen=True, kw_only=True)
class AtomPages(AtomSettings):
    """Pages of atoms."""

    @torch.inference_mode(False)
    @torch.no_grad()
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
        substitution, readers = _about(substitution, "substitution", sae), _about(readers, "readers", sae)
        tested = None if substitution is None else substituted(substitution)
        facts = Facts(self, model, sae, tokens, among=tested, progress=progress)
        if tested is None and self.substitution_firings:
            tested = small_test(facts)
        read = readers_of(facts, readers)
        pages = [_page(facts, column, tested, read) for column in range(len(facts.number))]
        whole = qualities(facts.lab)[self.label].to_dict() if self.quality else None
        facts.lab.facts = facts.counts  # not those of the small test
        info = facts.lab.describe(self.label) | {
            "settings": asdict(self),
            "quality": whole,
            "seconds": round(time.perf_counter() - started, 2),
        }
        return data.AtomPagesData(info=json.loads(json.dumps(info)), atoms=pages)


# ---------------------------------------------------------------------------------------------- results of evaluations


def _about(result: Result | None, kind: str, sae: SAE) -> Result | None:
    """A result that was checked to be of this kind, and of the SAE's hook; None where it holds no measurement."""
    about, expected = result and (result.kind, result.info["hook_name"]), (kind, HeadHook.of(sae).name)
    if about not in (None, expected):
        raise ValueError(f"{kind}: expected a result of {kind} about {expected[1]}, got {about}")
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
            controls = [name for name in test.controls if name not in REFERENCES]
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


def small_test(facts: Facts) -> dict[int, list[data.Substituted]] | None:
    """A small substitution test at the atoms' own coefficients; None where no firing has room for the horizon."""
    settings, position = facts.settings, facts.firings.position
    room = (position >= 1) & (position < facts.ids.shape[1] - settings.effect_horizon)
    if not len(testable := np.intersect1d(facts.number, facts.firings.atom[room])):
        return None
    test = Substitution(
        atoms=tuple(testable.tolist()),
        atom_choice=("own",),
        firings_per_atom=settings.substitution_firings,
        scales=("coefficient",),
        controls=("random", "state"),
        horizon=settings.effect_horizon,
        alive_tokens=facts.ids.size,
        mean_write_sequences=1,
        seed=settings.seed,
    )
    return substituted(Result(test, facts.lab.describe(), test.measure(facts.lab)))


def readers_of(facts: Facts, result: Result | None) -> dict[int, data.Readers]:
    """Per atom its strongest readers: by the evaluation `readers`, beside a random direction of the atom's norm; or by
    the measured effects, beside the median over the other atoms."""
    if result is not None:
        places = ["layer", "mixer", "head"]
        means = result.tables["changes"].groupby(["condition", "atom", *places])["change"].mean().unstack(places)
        changes, typical = means.loc["atom"], means.loc["random"].reindex(means.loc["atom"].index)
        words = {"what": "as given", "typical": "a random direction of the same norm"}
    else:
        changes = facts.effects.changes.set_axis(facts.number).dropna(how="all")
        others = {atom: changes.drop(index=atom).median() for atom in changes.index}
        typical = pd.DataFrame(others, index=changes.columns).T
        unit, other = "per norm of the native write, to first order", "the other atoms shown (median)"
        words = {"what": unit, "typical": other}
    readers: dict[int, data.Readers] = {}
    for atom in changes.index:
        largest = changes.loc[atom].dropna().sort_values(ascending=False, kind="stable")[: facts.settings.n_tokens]
        usual = typical.loc[atom][largest.index].map(short).astype(object)
        rows = zip(largest.index, largest.map(short), usual.where(usual.notna(), None))
        names = ("layer", "mixer", "head", "change", "typical")
        heads = [dict(zip(names, (int(l), mixer, int(h), x, y))) for (l, mixer, h), x, y in rows]
        readers[int(atom)] = data.Readers.model_validate({"heads": heads, **words})
    return readers


# ---------------------------------------------------------------------------------------------- one page


def _page(
    facts: Facts, column: int, tested: dict[int, list[data.Substituted]] | None, readers: dict[int, data.Readers]
) -> data.AtomPage:
    settings, atom, sign, traces = facts.settings, int(facts.number[column]), facts.sign(column), facts.swept[1][column]
    (whole, *sides), spots = facts.cosines(column), facts.spots(column)
    rows = facts.rows(column).assign(cosine=whole[spots])
    activations, written = rows["activation"].to_numpy(float), ~np.isnan(whole[spots])
    key, value = (_quartiles(sign * side[spots][written]) for side in sides)
    direct, firings = sign * facts.direct[column], np.bincount(facts.firings.atom)
    near = [
        data.Neighbour(atom=a, cosine=short(cosine), n_firings=int(firings[a])) for a, cosine in facts.nearest[column]
    ]
    return data.AtomPage(
        atom=atom,
        terms=_terms(facts, column, sign),
        nearest=near,
        n_firings=len(rows),
        rate=len(rows) / facts.ids.size,
        max_activation=float(activations.max()),
        mean_activation=float(rows["activation"].mean()),
        density=parts.bars(activations, low=0.0),
        logits=parts.bars(facts.change(column)[: facts.texts.size]),
        fires_on=_fires_on(facts, rows),
        top=parts.top(facts, rows),
        bands=list(parts.bands(facts, rows)),
        positions=_positions(rows["position"].to_numpy(), facts.ids.shape, settings.position_bins),
        cosines=_cosines(whole, spots) if written.any() else None,
        keys=data.Side(tokens=_by_token(facts, sign * sides[0]), at_firings=key),
        values=data.Side(tokens=parts.vocabulary(facts, direct), at_firings=value),
        effect=_effect(facts, column, direct),
        memory=memory([trace.life for trace in traces]),
        timelines=_timelines(facts, traces) if traces else None,
        readers=readers.get(atom),
        substitution=None if tested is None else tested.get(atom, []),
    )


def _terms(facts: Facts, column: int, sign: float) -> list[data.Term]:
    keys, values = (side[column].double().cpu() for side in (facts.terms.keys, facts.terms.values))
    sizes, whole = keys.norm(dim=-1) * values.norm(dim=-1), float(facts.matrices.rows([column]).norm()) ** 2
    keys, values = ((sign * normalize(side, dim=-1)).numpy().round(4).tolist() for side in (keys, values))
    return [
        data.Term(size=size, share=min(1.0, size**2 / whole), key=key, value=value)
        for size, key, value in zip(sizes.tolist(), keys, values)
        if size > 1e-6 * float(sizes[0])
    ]


def memory(lives: Sequence[Life]) -> data.Memory:
    """Median over firings. Sequences end before some writes have faded, so it is the median of the Kaplan-Meier
    curve; leaving those firings out would make memories look short."""
    if not lives:
        return data.Memory(half_life=None, longest=0, ended=0, n=0)
    tokens, ended = (np.array(each) for each in zip(*lives))
    survival = stats.ecdf(stats.CensoredData.right_censored(tokens, ended)).sf
    below = survival.quantiles[survival.probabilities <= 0.5]
    half_life = float(below[0]) if len(below) else None
    return data.Memory(half_life=half_life, longest=int(tokens.max()), ended=int(ended.sum()), n=len(lives))


def _effect(facts: Facts, column: int, direct: NDArray[np.float32]) -> data.Effect | None:
    """None where it was not measured. The sign of an atom does not matter to its effect, but to the direct path."""
    mean, n = facts.effects.mean[column], int(facts.effects.n[column])
    if n == 0:
        return None
    return data.Effect(
        tokens=parts.vocabulary(facts, mean),
        direct_r=float(np.corrcoef(mean, direct)[0, 1]) if mean.std() > 0 and direct.std() > 0 else None,
        size=float(mean.std()),
        n=n,
        horizon=facts.settings.effect_horizon,
    )


def _fires_on(facts: Facts, rows: pd.DataFrame) -> list[data.TokenValue]:
    """The tokens of most firings, with their share of the firings."""
    ids, counts = np.unique(facts.ids[rows["sequence"], rows["position"]], return_counts=True)
    order = np.argsort(-counts, kind="stable")[: facts.settings.n_tokens]
    return parts.listed(facts, ids[order], counts[order] / len(rows), counts[order])


def _by_token(facts: Facts, cosines: NDArray[np.float64]) -> data.Ends:
    """The mean of [N T] `cosines` over all occurrences of a token; NaN is no occurrence."""
    (ids, token), known = np.unique(facts.ids, return_inverse=True), ~np.isnan(cosines)
    token = token.reshape(-1)[known]
    n = np.bincount(token, minlength=len(ids))
    usual = np.flatnonzero(n >= facts.settings.min_token_count)
    means = np.bincount(token, cosines[known], len(ids))[usual] / n[usual]
    return parts.ends(facts, ids[usual], means, n[usual])


def _quartiles(values: ArrayLike) -> data.Quartiles | None:
    if not len(numbers := np.asarray(values, float)):
        return None
    q25, median, q75 = np.quantile(numbers, (0.25, 0.5, 0.75)).tolist()
    return data.Quartiles(median=median, q25=q25, q75=q75, n=len(numbers))


def _timelines(facts: Facts, traces: Sequence[Trace]) -> data.Timelines:
    """Means over all followed firings by tokens since the write, in bins that double; texts of the strongest."""
    table = np.array([*itertools.zip_longest(*(t.reads for t in traces), fillvalue=np.nan)])  # NaN: the sequence ended
    edges = [0, 1, *(2**i for i in range(1, 64) if 2**i < len(table)), len(table)]
    lags = [short(float(np.nanmean(table[a:b]))) for a, b in itertools.pairwise(edges)]
    width, firings = facts.settings.before + facts.settings.after + 1, list[data.Timeline]()
    for s, t, _, _, reads in sorted(traces, key=lambda trace: -trace.activation)[: facts.settings.n_timelines]:
        shown = {
            "tokens": facts.texts.many(facts.ids[s, t : t + len(reads)][:width]),
            "reads": [*map(short, reads[:width])],
        }
        firings.append(data.Timeline.model_validate({"sequence": s, "position": t, **shown}))
    return data.Timelines(lags=data.Bars(edges=[float(x) for x in edges], values=lags), firings=firings)


def _positions(positions: Integers, shape: tuple[int, ...], bins: int) -> data.Bars:
    """Firing rate by position; bins are whole tokens."""
    edges = np.unique(np.linspace(0, shape[1], min(bins, shape[1]) + 1).astype(int))
    rates = np.histogram(positions, edges)[0] / (np.diff(edges) * shape[0])
    return data.Bars(edges=edges.astype(float).tolist(), values=rates.tolist())


def _cosines(cosines: NDArray[np.float64], spots: Integers) -> data.Cosines:
    """Both histograms, over the whole tenths in which there is anything; of [N T] `cosines`, NaN where the native write
    is zero, and the places of the firings."""
    firings, silent = (part[~np.isnan(part)].clip(-1, 1) for part in (cosines[spots], np.delete(cosines, spots)))
    counts = [np.histogram(part, _FINE)[0] for part in (firings, silent)]
    seen = np.flatnonzero(counts[0] + counts[1])
    low, high = int(seen[0]) // 10 * 10, int(seen[-1]) // 10 * 10 + 10
    merge = next(size for size in (1, 2, 5, 10) if (high - low) // size <= parts.BARS)
    merged = [fine[low:high].reshape(-1, merge).sum(1) for fine in counts]
    shares = [[round(float(x), 5) for x in each / max(each.sum(), 1)] for each in merged]
    bars = [
        data.Bars(edges=[round(float(x), 2) for x in _FINE[low : high + 1 : merge]], values=each) for each in shares
    ]
    quartiles = cast(data.Quartiles, _quartiles(cosines[spots][~np.isnan(cosines[spots])]))  # there are firings
    return data.Cosines(at_firings=quartiles, firings=bars[0], silent=bars[1])
