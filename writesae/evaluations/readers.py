"""Readers: which downstream heads change most when an atom's write is ablated?

Source: WriteSAE (arXiv 2605.12770), reader traces, which list readers below the atom's own layer. A write reaches the
rest of the model through its own head's reads; only heads of **later layers**, recurrent or attention, at the same or
later tokens, can notice, and only those are looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from writesae.choices import AtLeast
from writesae.experiment.at_firings import OfHalves
from writesae.experiment.downstream_heads import downstream_heads, newest_outputs
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import Integers
from writesae.experiment.lab import EditedRows, Lab, Site, Trial, trials_at
from writesae.verdict.finding import Against, Finding, Paired

CONDITIONS: tuple[str, ...] = ("atom", "random", "other")

CONTROLS: dict[str, str] = {
    "other": "another atom at the same readers",
    "excess": "the same atom at the other downstream heads",
}
"""Columns of `ratios` that the reader must beat, and their names for a reader of the report."""

RELEVANT = float(np.log(1.1))
"""Log ratio of two changes: a change that is a tenth larger than another."""

_HEAD = ["layer", "mixer", "head"]


@dataclass(frozen=True, kw_only=True)
class Readers(OfHalves):
    """At a firing (token t, atom i) the write W_t becomes W_t - a_i A_i. What a downstream head gives is its reads
    (`hook_read`) or, for an attention head, its mix of values (`hook_z`). The **change** of a head is the norm of the
    change of what it gives over t..t+horizon, divided by the norm of what it gives without edits. Heads of the same
    layer or below cannot change and are not listed; nor are tokens before t.

    An atom's **reader** is the head with the largest mean log ratio of its change to its change under a random
    direction, over the firings of the selection half of the sequences. All that follows is measured on the other half.

    The controls are ablated at the same token with the same norm:

    - `random`: a Gaussian direction, drawn anew at each firing.
    - `other`: the direction of another of the atoms.

    **Verdict** (a claim of this project): the ladder of `judge` on the mean of log(change / change under random) at the
    readers, which must exceed 0. It is confounded where the change is no larger than under another atom (the reader
    notices anything), or where the log ratio is no larger than its mean over the other downstream heads (all of them
    notice it; this control needs a second downstream head). Intervals resample sequences and atoms. A change matters
    where it is a tenth larger. The typical size is the median change at the readers, the floor what a no-op changes,
    mean over downstream heads.
    """

    n_atoms: Annotated[int | None, AtLeast(2)] = 16
    """Atoms drawn uniformly from those that fire often enough in both halves. None: all of them."""

    question: ClassVar[str] = "Which later heads read an atom's write?"
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "changes": {
            "firing": "number of the firing",
            "half": "half of the sequences: select or test",
            "atom": "index in the dictionary",
            "sequence": "row of the evaluation tokens",
            "position": "token t of the firing",
            "layer": "layer of the downstream head",
            "mixer": "what it is a head of: recurrence or attention",
            "head": "the downstream head",
            "condition": "what was ablated: atom, random, other",
            "change": "change of what the head gives over t..t+horizon, divided by the norm of that",
        }
    }

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        """Cost: three edited rows of horizon + 1 tokens for each firing, and one without edits for each batch.

        Raises:
            NothingToMeasureError: no layer with heads comes after that of the dictionary.
        """
        mixers = downstream_heads(lab.model, lab.hook.layer)
        lab.require(
            bool(mixers), f"no layer with heads comes after layer {lab.hook.layer}: nothing can read its writes"
        )
        places = pd.DataFrame([(m.layer, m.mixer, head) for m in mixers for head in range(m.n_heads)], columns=_HEAD)
        atoms, _, sides = self.drawn(lab, lab.rng())
        lab.require(len(atoms) > 1, "the control 'other' needs a second atom that fires often enough")
        samples = [sample.assign(half=half) for half, (_, sample) in zip(("select", "test"), sides)]
        units = pd.concat(samples, ignore_index=True).rename_axis("firing").reset_index()
        tables = []
        with newest_outputs(lab.model, [mixer.hook for mixer in mixers]) as newest:

            def changes(rows: EditedRows) -> Mapping[str, ArrayLike]:
                """Relative change at every downstream head [n,heads], against the plain row of the same batch."""
                of_mixers = []
                for mixer in mixers:
                    outputs = newest[mixer.hook]  # [n+1,S,H,V], the plain row last
                    native = rows.windows(outputs[-1].expand_as(outputs))  # [n,W,H,V]
                    size, gap = (x.norm(dim=(1, 3)) for x in (native, rows.windows(outputs) - native))
                    of_mixers.append((gap / size).where(size > 0, torch.nan).cpu())
                return {"change": torch.cat(of_mixers, 1).numpy()}

            def floor(rows: EditedRows) -> Mapping[str, ArrayLike]:
                return {"change": np.nan_to_num(changes(rows)["change"]).mean(1)}

            lab.facts["floor"] = lab.floor(floor, "change", self.horizon + 1, plain=True)
            for site in lab.sites(units, self.kind):
                rows = lab.read(site, self._trials(lab, site, atoms), changes, self.horizon + 1, plain=True)
                change = np.concatenate(rows.pop("change").tolist())
                tables.append(rows.merge(places, how="cross").assign(change=change))
        table = pd.concat(tables, ignore_index=True)
        quiet = table["change"].isna()
        lab.skipped["firings x heads that natively give zero"] += int(quiet.sum()) // len(CONDITIONS)
        lab.require(not quiet.all(), "no downstream head reads anything after a firing")
        return {"changes": table[~quiet].reset_index(drop=True)}

    def _trials(self, lab: Lab, site: Site, numbers: Integers) -> list[Trial]:
        """What is ablated under each condition, at each firing of a site."""
        rng, column = lab.rng(8, site.sequence), pd.Index(numbers).get_indexer(pd.Index(site.rows["atom"]))
        step = rng.integers(1, len(numbers), len(column))
        atom, other = lab.atoms(numbers[column]), lab.atoms(numbers[(column + step) % len(numbers)])
        atom = atom * torch.tensor(site.rows["activation"].to_numpy()).to(atom.values)
        noise = atom.random_like(torch.Generator().manual_seed(int(rng.integers(2**62))))
        size = -atom.norm()  # ablated
        added = {"atom": atom * -1.0, "random": noise.with_norm(size), "other": other.with_norm(size)}
        return [
            trial
            for condition, matrices in added.items()
            for trial in trials_at(site.rows.assign(condition=condition), lab.add, matrices)
        ]

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Do the readers that one half names read on the other?"""
        at, readers = at_readers(result), readers_of_atoms(result)
        logs = Paired(at, ("sequence", "atom"), self.seed)
        several = len(result.tables["changes"][_HEAD].drop_duplicates()) > 1
        kinds = readers["mixer"].map({"recurrence": "H", "attention": "A"})
        named = ("L" + readers["layer"].astype(str) + kinds + readers["head"].astype(str)).value_counts()
        ratio = logs.means({"random": "a random direction"} | CONTROLS)
        return [
            Finding(
                claim="an atom's write has its own readers among downstream heads",
                effect=ratio["a random direction"],
                what="the log ratio of the readers' change to that under a random direction",
                null=CONTROLS["other"],
                against={shown: Against(ratio[shown]) for c, shown in CONTROLS.items() if c != "excess" or several},
                relevant=RELEVANT,
                typical=float(at["change"].median()),
                floor=result.fact("floor"),
                shown=ratio,
                write=lambda log: f"{np.exp(log):.2f}",
                axis="times the change under a random direction",
                measured=f"change at the reader {at['change'].median():.2g} of what it outputs (readers: "
                + ", ".join(f"{name} of {n}" for name, n in named.head(3).items())
                + " atoms)",
                of=f"firings of {at['atom'].nunique()} atoms in {at['sequence'].nunique()} sequences",
            )
        ]


def ratios(result: Result, half: str) -> pd.DataFrame:
    """For each firing of one half and each downstream head: `change` under the atom; `random` and `other`, the log
    ratio of that to the control's; `excess`, the log ratio to random minus its mean over the other downstream heads (0
    where there are none)."""
    table = result.tables["changes"]
    wide = table[table["half"] == half].pivot(
        index=["firing", "atom", "sequence", *_HEAD], columns="condition", values="change"
    )
    logs = {name: np.log(np.maximum(wide[name].to_numpy(float), 1e-12)) for name in CONDITIONS}
    values = {name: logs["atom"] - logs[name] for name in ("random", "other")}
    heads = wide.index.to_frame(index=False).assign(change=wide["atom"].to_numpy(float), **values)
    group = heads.groupby("firing")["random"]
    n, total = group.transform("size").to_numpy(), group.transform("sum").to_numpy()
    others = (total - values["random"]) / np.maximum(n - 1, 1)
    return heads.assign(excess=np.where(n > 1, values["random"] - others, 0.0))


def readers_of_atoms(result: Result) -> pd.DataFrame:
    """The reader of each atom by the selection half: atom, layer, mixer, head, and its mean log_ratio there."""
    means = ratios(result, "select").groupby(["atom", *_HEAD], as_index=False)["random"].mean()
    return (
        means.loc[means.groupby("atom")["random"].idxmax()]
        .reset_index(drop=True)
        .rename(columns={"random": "log_ratio"})
    )


def at_readers(result: Result) -> pd.DataFrame:
    """`ratios` of the test half, at each atom's own reader."""
    keys = ["atom", *_HEAD]
    return ratios(result, "test").merge(readers_of_atoms(result)[keys], on=keys)
