"""Multi-atom substitution: the write replaced by its sparse code of 1, 2, ... atoms, and by all of them.

The substitution test replaces a write by one atom. Its code has k of them; here the n strongest are written together,
so that a reader sees how many it takes. Source: future work of WriteSAE (arXiv 2605.12770).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.conditions import Condition, Factors, cosine, mean_write, norm, with_norm
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings
from sae_lens_writesae.head_memory import HeadWrites, head_writes
from sae_lens_writesae.interventions.common import by_sequence, checked_hook, head_atoms
from sae_lens_writesae.multi_atom_result import MultiAtom, MultiAtomConfig
from sae_lens_writesae.progress import bar
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_draw import draw
from sae_lens_writesae.substitution_edits import edits_of, measure
from sae_lens_writesae.substitution_result import METRICS


class _Run(NamedTuple):
    """What stays the same over sequences."""

    model: Any
    sae: Any
    hook: HeadHook
    config: MultiAtomConfig
    test: SubstitutionConfig
    firings: Firings
    mean: Factors  # N = 1, terms by falling size
    bias: Factors | None  # N = 1


class _Written(NamedTuple):
    """A condition with what the table says of it."""

    condition: Condition
    n_atoms: int
    is_all: bool


@torch.no_grad()
def run_multi_atom(
    model: Any, sae: Any, tokens: Tensor, config: MultiAtomConfig | None = None, progress: bool = True
) -> MultiAtom:
    """Replace writes by growing parts of their code on sequences [N,T] that neither model nor SAE was trained on.

    Cost: N forwards up to the SAE's layer; for each drawn position 2 + scales * (counts + 1) * (2 + controls) edited
    rows of horizon + 1 tokens.

    Raises:
        ValueError: an SAE of another head or model, sequences too short, or no alive atoms.
    """
    begin, config = time.perf_counter(), config or MultiAtomConfig()
    test = config.substitution()
    hook = checked_hook(model, sae, tokens, test.first_position + test.horizon + 1)
    firings = collect_firings(model, sae, tokens, progress=progress)
    table = draw(firings, test).table.drop_duplicates(["sequence", "position"])
    run = _Run(
        model, sae, hook, config, test, firings, _mean_write(model, hook, tokens, config), _bias(model, sae, hook)
    )
    frames: list[pd.DataFrame] = []
    omitted = {"positions with a zero native write": 0}
    for sequence, part in bar(by_sequence(table), "multi-atom", progress):
        frames += _sequence(run, tokens[[sequence]], sequence, part["position"].tolist(), omitted)
    if not frames:
        raise NothingToMeasureError(
            "every native write at the drawn positions is zero, so that there is nothing to replace"
        )
    found = pd.DataFrame(pd.concat(frames, ignore_index=True), columns=list(MultiAtom.COLUMNS["writes"]))
    seconds = time.perf_counter() - begin
    settings = {"config": asdict(config), "omitted": omitted, "conditions": len(found)}
    return MultiAtom(
        describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, **settings), {"writes": found}
    )


def _sequence(
    run: _Run, tokens: Tensor, sequence: int, positions: list[int], omitted: dict[str, int]
) -> Iterator[pd.DataFrame]:
    """All conditions at the positions of one sequence, position by position: codes differ in length."""
    session = run.model.edit_session(tokens)
    writes = head_writes(session.recurrence(run.hook.layer), run.hook.head, "additive")
    for t in positions:
        native = writes.native.rows([t])
        if float(norm(native)) == 0:
            omitted["positions with a zero native write"] += 1
            continue
        made = list(_conditions(run, native, _code(run, sequence, t), _bases(run, writes, t)))
        edits = [edits_of(run.hook, run.test, written.condition, native, [t]) for written in made]
        kl = measure(session, edits, [t], [False], run.test)[:, 0]
        yield pd.DataFrame([_row(w, native, values) for w, values in zip(made, kl)]).assign(
            sequence=sequence, position=t
        )


def _row(written: _Written, native: Factors, kl: Any) -> dict[str, Any]:
    condition, what = written.condition, written.condition.written
    return {
        "condition": condition.name,
        "scale": condition.scale,
        "count": written.n_atoms,
        "all": written.is_all,
        "terms": 0 if what is None else what.keys.shape[1],
        "kl": kl[METRICS.index("kl_window")],
        "kl_at": kl[METRICS.index("kl_at")],
        "norm": 0.0 if what is None else float(norm(what) / norm(native)),
        "cosine": 0.0 if what is None else float(cosine(what, native)),
    }


def _conditions(run: _Run, native: Factors, code: list[Factors], bases: dict[str, Factors]) -> Iterator[_Written]:
    """What is written at one position. `code` holds the active atoms, strongest first (N = 1 each)."""
    yield _Written(Condition("native", "none", native), 0, False)
    yield _Written(Condition("delete", "none", None), 0, False)
    counts = [n for n in run.config.counts if n < len(code)]
    for scale in run.config.scales:
        if run.bias is not None:
            yield _Written(Condition("bias", scale, _at_scale(run.bias, native, scale)), 0, False)
        for n, whole in [*((n, False) for n in counts), (len(code), True)]:
            partial = joined(code[:n])
            if float(norm(partial)) == 0:
                continue
            sums = {"code": partial}
            if run.bias is not None:
                sums["code + bias"] = joined([partial, run.bias])
            for name, what in sums.items():
                yield _Written(Condition(name, scale, _at_scale(what, native, scale)), n, whole)
            size, terms = norm(_at_scale(partial, native, scale)), partial.keys.shape[1]
            for name, basis in bases.items():
                top = Factors(basis.keys[:, :terms].to(partial.keys), basis.values[:, :terms].to(partial.values))
                yield _Written(Condition(name, scale, with_norm(top, size)), n, whole)


def _at_scale(what: Factors, native: Factors, scale: str) -> Factors:
    return with_norm(what, norm(native).to(what.values)) if scale == "matched" else what


def joined(parts: Sequence[Factors]) -> Factors:
    """The sum of matrices (each N = 1), as one with all of their terms."""
    return Factors(torch.cat([p.keys for p in parts], 1), torch.cat([p.values for p in parts], 1))


def _code(run: _Run, sequence: int, position: int) -> list[Factors]:
    """a_i A_i of the active atoms at one position, strongest first."""
    own = run.firings.frame((run.firings.sequence == sequence) & (run.firings.position == position))
    atoms = head_atoms(run.model, run.sae, run.hook, own["atom"].to_numpy())
    activation = torch.tensor(own["activation"].to_numpy()).to(atoms.values)
    scaled_ = Factors(atoms.keys, atoms.values * activation[:, None, None])
    order = norm(scaled_).argsort(descending=True).tolist()
    return [scaled_.rows([n]) for n in order]


def _bases(run: _Run, writes: HeadWrites, position: int) -> dict[str, Factors]:
    """The controls at one position as singular terms, largest first: mean write, state before and after the write."""
    after = writes.recurrence.states(positions=[position])[0, :, 0]
    made = {"mean": run.mean}
    for name, state in (("state", after - writes.native.rows([position]).dense()), ("state_after", after)):
        left, sigma, right = torch.linalg.svd(state, full_matrices=False)
        made[name] = Factors((left * sigma[:, None, :]).mT, right)
    return {name: made[name] for name in run.config.controls}


def _mean_write(model: Any, hook: HeadHook, tokens: Tensor, config: MultiAtomConfig) -> Factors:
    """The head's mean write as its singular terms, largest first."""
    native = [
        head_writes(model.recurrence(tokens[[n]], hook.layer), hook.head, "additive").native
        for n in range(min(config.mean_write_sequences, len(tokens)))
    ]
    return mean_write(torch.cat([w.keys[:, 0] for w in native]), torch.cat([w.values[:, 0] for w in native]))


def _bias(model: Any, sae: Any, hook: HeadHook) -> Factors | None:
    """The decoder bias as its singular terms; None where it is zero."""
    shape = model.cfg.layer(hook.layer)
    bias = getattr(sae, "b_dec", None)
    if bias is None or not bool(bias.any()):
        return None
    dense = bias.detach().float().reshape(1, shape.K, shape.V).to(model.cfg.device)
    left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
    kept = sigma[0] > sigma[0, 0] * 1e-6
    return Factors((left * sigma[:, None, :]).mT[:, kept], right[:, kept])
