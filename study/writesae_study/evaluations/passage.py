"""Passages without a class of atoms: what does it cost the model to lose every firing of registers, or of bundles?

Source: WriteSAE (arXiv 2605.12770), passage NLL. The paper compares atoms that are ablated with random writes that
are inserted; here random writes of the same norms are ablated and inserted alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from hookpoints import WriteEdit
from writesae.experiment.firings import Integers
from writesae.experiment.lab import Site, Trial
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.draws import halves
from writesae_study.experiment.evaluation import Evaluation, Result
from writesae_study.experiment.readout import added_bits
from writesae_study.head.writes import torch_generator
from writesae_study.verdict.finding import Finding, Paired
from writesae_study.verdict.notation import signed

CONTROL_NAMES: dict[str, str] = {
    "own": "same writes ablated by the same norm",
    "removed": "other writes ablated by the same norm",
    "inserted": "other writes inserted",
    "random": "random directions inserted",
}
"""Conditions other than the deletion, and their names for a reader."""

RELEVANT = 0.01
"""Bits per token: 0.7 percent of the perplexity. The paper reports +0.005 for registers and
+0.226 for random writes."""


@dataclass(frozen=True, kw_only=True)
class Passage(Evaluation):
    """At each token t of a passage where atoms of a class fire, the write W_t becomes W_t - sum_i a_i A_i, i over the
    class's atoms (`deleted`). The **cost** is the mean over the passage of -log2 p(next token), minus the same without
    edits, in bits per token.

    The controls change as many writes, each by c_t = |sum_i a_i A_i|:

    - `own`: c_t is taken from the write that is there.
    - `removed`: the same norms are taken from the writes of as many random tokens.
    - `inserted`: the writes of random other tokens are inserted, at norm c_t.
    - `random`: Gaussian rank-1 directions are inserted, at norm c_t (the paper's control).

    A no-op, `native`, writes the native writes of the same tokens again and measures the floor.

    **Verdict** of claim 19, for the class `register` (or the first): the ladder of `judge` on
    cost(deleted) - cost(random), which must be below 0. It is confounded where other ablated writes (`removed`)
    cost as little: then it counts that writes are ablated rather than inserted, not which. Intervals resample
    passages. A difference matters from 0.01 bits per token on. The typical size is the largest mean cost of a
    condition, the floor the 95th percentile of the no-op.
    """

    passages: Annotated[int, Ge(2)] = 20
    """Sequences of the test half whose cost is measured; fewer where there are fewer."""
    threshold: float = 0.05
    """Median signed cosine with the native write, over an atom's firings on the other half of the sequences, from which
    on it is a register and not a bundle."""
    min_firings: PositiveInt = 4
    """Firings on the other half that an atom needs to be given a class."""

    columns: ClassVar[dict[str, dict[str, str]]] = {
        "passages": {
            "sequence": "row of the evaluation tokens, in the test half",
            "class": "name of the class",
            "condition": "what was done to the writes: deleted, own, removed, inserted, random, native (a no-op)",
            "bits": "bits per token, minus those of the unedited passage",
            "tokens_edited": "tokens at which the class fires, so that their write was changed",
        },
        "classes": {"class": "name of the class", "atom": "index in the dictionary"},
    }

    @property
    def shortest(self) -> int:
        return 8

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        """Cost: for each passage one forward, and six edited ones for each class."""
        split = halves(len(lab.tokens), self.seed)
        classes = self._atom_classes(lab, split.select)
        tables = []
        for site in lab.sites(pd.DataFrame({"sequence": split.test[: self.passages]}), self.kind):
            tokens = lab.tokens[site.sequence]
            trials: list[Trial] = []
            for number, (name, atoms) in enumerate(classes.items()):
                rng = lab.rng(6, site.sequence, number)
                trials += self._passage_trials(lab, site, name, atoms, rng)
            if trials:
                tables.append(lab.read(site, trials, added_bits(tokens), None))
        lab.require(bool(tables), f"no class fires on the passages: {', '.join(classes)}; give more sequences")
        table = pd.concat(tables)
        table = table[table.groupby("class")["sequence"].transform("nunique") >= 2]
        lab.require(not table.empty, f"no class fires in two passages: {', '.join(classes)}; give more sequences")
        names = table["class"].unique().tolist()
        lab.skipped["classes that never fire on the passages"] += len(classes) - len(names)
        members = [(name, int(atom)) for name in names for atom in classes[name]]
        return {"passages": table, "classes": pd.DataFrame(members, columns=["class", "atom"])}

    def _atom_classes(self, lab: Bench, sequences: Integers) -> dict[str, Integers]:
        """The atoms that are registers and bundles by the median cosine on some sequences."""
        # An empty table first, so that columns have their types where nothing fires.
        cosines = [pd.DataFrame({"atom": np.array([], int), "cosine": np.array([], float)})]
        for sequence, rows in lab.firings().of_sequences(sequences).frame().groupby("sequence"):
            atoms = lab.atoms(rows["atom"].to_numpy())
            writes = lab.native_writes([int(str(sequence))])
            at_firings = writes.rows(rows["position"].tolist()).to(atoms.keys)
            cosine = atoms.cosine(at_firings).double().cpu().numpy()
            cosines.append(rows[["atom"]].assign(cosine=cosine))
        # A class by the median, of atoms that fire often enough for one.
        of_atom = pd.concat(cosines).groupby("atom")["cosine"].agg(["size", "median"])
        often = of_atom[of_atom["size"] >= self.min_firings]
        lab.skipped["atoms with too few firings for a class"] += len(of_atom) - len(often)
        lab.require(
            len(often) > 0,
            f"no atom fires {self.min_firings} times on the half of the sequences that classes are made on",
        )
        is_register = often["median"] >= self.threshold
        registers = often.index[is_register].to_numpy()
        bundles = often.index[~is_register].to_numpy()
        classes = {"register": registers, "bundle": bundles}
        return {name: members for name, members in classes.items() if len(members)}

    def _passage_trials(
        self, lab: Bench, site: Site, name: str, atoms: Integers, rng: np.random.Generator
    ) -> list[Trial]:
        """All conditions of one class in one passage; none where the class does not fire."""
        firings = lab.firings().of_sequences(np.array([site.sequence]))
        inside = np.isin(firings.atom, atoms)
        written = np.flatnonzero(site.writes.norm().cpu().numpy() > 0)
        if not inside.any() or len(written) < 2:
            return []
        # What the class writes at each token where it fires: the sum of its components there.
        atom = lab.atoms(firings.atom[inside])
        components = atom * -torch.tensor(firings.activation[inside]).to(atom.values)
        fired_at = firings.position[inside]
        positions = np.unique(fired_at).tolist()
        sums = []
        for t in positions:
            of_token = np.flatnonzero(fired_at == t).tolist()
            sums.append(components.rows(of_token).total())
        # Deletion takes that sum away; controls change as many writes by the same norms.
        native = site.at(positions)
        size = torch.tensor([float(change.norm()) for change in sums]).to(native.values)
        edits = {"deleted": [lab.add(t, change) for t, change in zip(positions, sums)]}
        edits |= self._control_edits(lab, site, positions, size, written, rng)
        edits["native"] = [lab.replace(t, native, n) for n, t in enumerate(positions)]
        # One edited run for each condition, from its first edit on.
        described = {"sequence": site.sequence, "class": name, "tokens_edited": len(positions)}
        trials = []
        for condition, edits_of_passage in edits.items():
            if edits_of_passage:
                first = min(edit.position or 0 for edit in edits_of_passage)
                trials.append(Trial({**described, "condition": condition}, first, edits_of_passage))
        return trials

    def _control_edits(
        self,
        lab: Bench,
        site: Site,
        positions: list[int],
        size: Tensor,
        written: NDArray[np.intp],
        rng: np.random.Generator,
    ) -> dict[str, list[WriteEdit]]:
        """The edits of each control: as many writes, changed by the norms `size`.

        Args:
            written: positions of the passage whose write is not zero.
        """
        native = site.at(positions)
        # Without repetition where the passage has enough writes, so that none is changed twice.
        other_positions = rng.choice(written, len(positions), replace=len(written) < len(positions)).tolist()
        elsewhere = [int(rng.choice(written[written != t])) for t in positions]
        noise = torch_generator(rng)
        first = native.terms(slice(0, 1))  # of one rank, as what is inserted
        usable = first.norm() > 0
        usable_positions = [t for t, is_usable in zip(positions, usable.tolist()) if is_usable]
        changed = {  # condition: where, what is added in which direction, at which signed norm
            "own": (usable_positions, first.rows(usable), -size[usable]),
            "removed": (other_positions, site.at(other_positions), -size),
            "inserted": (positions, site.at(elsewhere), size),
            "random": (positions, first.random_like(noise), size),
        }
        edits = {}
        for condition, (places, directions, norms) in changed.items():
            added = directions.with_norm(torch.ones_like(norms)) * norms  # ablated where negative
            edits[condition] = [lab.add(t, added, n) for n, t in enumerate(places)]
        return edits

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 19 for registers, or the first class where there are none; then the other classes."""
        names = result.tables["passages"]["class"].unique().tolist()
        first = "register" if "register" in names else names[0]
        first_then_others = sorted(names, key=lambda name: name != first)
        return [self._cost_finding(result, name, first) for name in first_then_others]

    def _cost_finding(self, result: Result, name: str, first: str) -> Finding:
        table = result.tables["passages"]
        members = result.tables["classes"]
        of_class = table[table["class"] == name]
        bits = Paired.of(of_class, "bits", seed=self.seed)
        costs = bits.means({"deleted": "class ablated"} | CONTROL_NAMES)
        n_tokens = of_class.loc[of_class["condition"] == "deleted", "tokens_edited"].mean()
        return Finding(
            number=19 if name == first else None,
            claim=f"ablating class {name} costs less than inserting random directions",
            effect=bits.mean("deleted", "random"),
            what="the cost of ablating the atoms, minus that of inserting random directions,",
            null=CONTROL_NAMES["removed"],
            against=bits.beaten("deleted", {"removed": CONTROL_NAMES["removed"]}),
            less=True,
            relevant=RELEVANT,
            typical=max(abs(cost.mean) for cost in costs.values()),
            floor=bits.size_of("native")["floor"],
            shown=costs,
            write=signed,
            axis="bits per token",
            measured=f"{(members['class'] == name).sum()} atoms, {n_tokens:.0f} tokens a passage",
            of="passages",
        )
