"""Passages without a class of atoms: what does it cost the model to lose every firing of registers, or of bundles?

Source: WriteSAE (arXiv 2605.12770), passage NLL. The paper compares atoms that are taken away with random writes that
are put in; here random writes of the same norms are taken away and put in alike.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.conditions import Factors, cosine, norm, random_directions, rank_one, scaled, with_norm
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.interventions.common import add_edit, by_sequence, checked_hook, column_table, head_atoms
from sae_lens_writesae.interventions.draw import halves
from sae_lens_writesae.interventions.passage_result import Passage, PassageConfig
from sae_lens_writesae.progress import bar


class _Run(NamedTuple):
    """What stays the same over passages."""

    model: Any
    sae: Any
    hook: HeadHook
    tokens: Tensor
    firings: Firings
    classes: dict[str, NDArray[np.int64]]
    config: PassageConfig


@torch.no_grad()
def run_passage(
    model: Any, sae: Any, tokens: Tensor, config: PassageConfig | None = None, progress: bool = True
) -> Passage:
    """Take classes of atoms away from passages [N,T] that neither model nor SAE was trained on.

    Cost: N forwards up to the SAE's layer; for each passage one forward and classes * 5 edited ones.

    Raises:
        ValueError: an SAE of another head or model, too few sequences, or no class with atoms.
    """
    begin, config = time.perf_counter(), config or PassageConfig()
    hook = checked_hook(model, sae, tokens, 8)
    split = halves(len(tokens), config.seed)
    firings = collect_firings(model, sae, tokens, progress=progress)
    omitted = {"atoms with too few firings for a class": 0, "classes that never fire on the passages": 0}
    classes = _classes(model, sae, hook, tokens[split.select], _part(firings, split.select), config, omitted)
    run = _Run(model, sae, hook, tokens, firings, classes, config)
    rows = []
    for sequence in bar(split.test[: config.passages].tolist(), "passages", progress):
        rows += _passage(run, sequence)
    table: Any = column_table(rows, Passage.COLUMNS["passages"])
    enough = table.groupby("class")["sequence"].nunique()
    kept = [name for name in classes if enough.get(name, 0) >= 2]
    omitted["classes that never fire on the passages"] = len(classes) - len(kept)
    if not kept:
        raise NothingToMeasureError(f"no class fires in two passages: {', '.join(classes)}; give more sequences")
    table = table[table["class"].isin(kept)].reset_index(drop=True)
    members = [{"class": name, "atom": int(atom)} for name in kept for atom in classes[name]]
    seconds = time.perf_counter() - begin
    plain = asdict(config) | {"classes": None if config.classes is None else sorted(config.classes)}
    settings = {"config": plain, "omitted": omitted, "conditions": len(table)}
    tables = {"passages": table, "classes": column_table(members, Passage.COLUMNS["classes"])}
    return Passage(describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, **settings), tables)


def _part(firings: Firings, sequences: NDArray[np.int64]) -> pd.DataFrame:
    """Firings on some sequences, whose number becomes the index among them."""
    table = firings.frame(np.isin(firings.sequence, sequences))
    return table.assign(sequence=np.searchsorted(sequences, table["sequence"].to_numpy()))


def _classes(
    model: Any,
    sae: Any,
    hook: HeadHook,
    tokens: Tensor,
    table: pd.DataFrame,
    config: PassageConfig,
    omitted: dict[str, int],
) -> dict[str, NDArray[np.int64]]:
    """The classes given, or register and bundle by the median cosine on `tokens`."""
    if config.classes is not None:
        d_sae = int(sae.cfg.d_sae)
        wrong = sorted({i for atoms in config.classes.values() for i in atoms if not 0 <= i < d_sae})
        if wrong:
            raise ValueError(f"classes name atoms {wrong}, the SAE has atoms 0 to {d_sae - 1}")
        return {name: np.array(atoms) for name, atoms in config.classes.items()}
    parts = []
    for sequence, own in by_sequence(table):
        found = head_writes(model.recurrence(tokens[[sequence]], hook.layer), hook.head, "additive").native
        atoms = head_atoms(model, sae, hook, own["atom"].to_numpy())
        here = found.rows(own["position"].tolist())
        parts.append(
            own.assign(cosine=cosine(atoms, Factors(here.keys.to(atoms.keys), here.values.to(atoms.values))).cpu())
        )
    if not parts:
        raise NothingToMeasureError("no atom fires on the half of the sequences that classes are made on")
    grouped: Any = pd.concat(parts).groupby("atom")["cosine"].agg(["median", "size"])
    enough = grouped[grouped["size"] >= config.min_firings]
    omitted["atoms with too few firings for a class"] = len(grouped) - len(enough)
    high = enough["median"] >= config.threshold
    classes = {"register": enough.index[high].to_numpy(np.int64), "bundle": enough.index[~high].to_numpy(np.int64)}
    found_ = {name: atoms for name, atoms in classes.items() if len(atoms)}
    if not found_:
        raise NothingToMeasureError(
            f"no atom fires {config.min_firings} times on the half of the sequences that classes are made on"
        )
    return found_


def _passage(run: _Run, sequence: int) -> list[dict[str, Any]]:
    """All conditions of one passage."""
    tokens = run.tokens[[sequence]]
    session = run.model.edit_session(tokens)
    native = head_writes(session.recurrence(run.hook.layer), run.hook.head, "additive").native
    plain = _bits(session.logits, tokens)
    named, rows = [], []
    for number, (name, atoms) in enumerate(run.classes.items()):
        rng = np.random.default_rng([run.config.seed, 6, sequence, number])
        made = _edits(run, sequence, atoms, native, rng)
        if made is None:
            continue
        sizes = norm(native.rows(made.positions)).clamp_min(1e-30)
        described = {"sequence": sequence, "class": name, "native_bits": plain, "tokens_edited": len(made.positions)}
        described["norm"] = float((made.norms.to(sizes) / sizes).mean())
        named += [described | {"condition": condition} for condition in made.rows]
        rows += list(made.rows.values())
    if not rows:
        return []
    found = session.run(rows, batch_size=run.config.rows_per_run)
    for row, logits in zip(named, found.logits):
        whole = torch.cat([session.logits[0, : found.start], logits])
        row["bits"] = _bits(whole[None], tokens) - plain
    return named


class _Edits(NamedTuple):
    """Rows of edits by condition, the tokens where the class fires and the norms of what is taken there."""

    rows: dict[str, list[WriteEdit]]
    positions: list[int]
    norms: Tensor


def _edits(
    run: _Run, sequence: int, atoms: NDArray[np.int64], native: Factors, rng: np.random.Generator
) -> _Edits | None:
    """The edits of one class in one passage; None where it does not fire."""
    own = run.firings.frame((run.firings.sequence == sequence) & np.isin(run.firings.atom, atoms))
    written = torch.tensor((norm(native) > 0).cpu().numpy())
    if own.empty or int(written.sum()) < 2:
        return None
    factors = head_atoms(run.model, run.sae, run.hook, own["atom"].to_numpy())
    taken = scaled(factors, -torch.tensor(own["activation"].to_numpy()).to(factors.values))
    where = own["position"].to_numpy()
    positions = sorted(set(where.tolist()))
    deleted, norms = [], []
    for t in positions:
        here = taken.rows(np.flatnonzero(where == t).tolist())
        whole = Factors(here.keys.flatten(0, 1)[None], here.values.flatten(0, 1)[None])
        deleted.append(add_edit(run.hook, t, whole))
        norms.append(float(norm(whole)))
    able = np.flatnonzero(written.numpy())
    others = rng.choice(able, len(positions), replace=len(able) < len(positions))
    elsewhere = [int(rng.choice(able[able != t])) for t in positions]
    seed = torch.Generator().manual_seed(int(rng.integers(2**62)))
    like = rank_one(native.keys[positions, 0], native.values[positions, 0])
    size = torch.tensor(norms).to(native.values)
    usable = norm(like) > 0
    rows = {
        "deleted": deleted,
        "own": _at(run, [t for t, u in zip(positions, usable) if u], like.rows(usable), -size[usable]),
        "removed": _at(run, others.tolist(), native.rows(others.tolist()), -size),
        "inserted": _at(run, positions, native.rows(elsewhere), size),
        "random": _at(run, positions, random_directions(like, seed), size),
    }
    return _Edits({name: row for name, row in rows.items() if row}, positions, size)


def _at(run: _Run, positions: list[int], directions: Factors, sizes: Tensor) -> list[WriteEdit]:
    """Add `sizes` (signed) along unit directions at positions."""
    if not positions:
        return []
    made = scaled(with_norm(directions, torch.ones_like(sizes)), sizes)
    return [add_edit(run.hook, t, made, n) for n, t in enumerate(positions)]


def _bits(logits: Tensor, tokens: Tensor) -> float:
    """Mean over a passage [1,T] of -log2 p(next token)."""
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].to(logits.device))
    return float(loss) / math.log(2)
