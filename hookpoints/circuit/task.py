"""The circuit of a task: graphs of texts of one form, averaged by role of the token, and tried on texts held out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from torch import Tensor

from hookpoints.circuit.graph import DRAWS, Graph
from hookpoints.circuit.nodes import Token
from hookpoints.circuit.tables import by_size, random_orders
from hookpoints.errors import InputError, PredictionWarning

_PLACE = ["role", "layer", "head"]


class Pair(NamedTuple):
    """One case of a task: a text, another of as many tokens, and what is to be said after each."""

    text: str | Tensor
    corrupt: str | Tensor
    target: Token
    against: Token


class Case(NamedTuple):
    """One text of a task."""

    graph: Graph
    answer: tuple[int, ...]
    """Token ids of the target, and of what it is compared with."""
    writes: pd.DataFrame
    """Rows of its nodes, with columns ``role`` and ``effect``: measured, or else predicted."""

    def kept(self, circuits: Sequence[pd.DataFrame]) -> list[float]:
        """Share of the effect of all writes that those of each circuit (role, layer, head) have alone."""
        shares, _ = self.graph.shares_without([self._writes_outside(circuit) for circuit in circuits])
        return shares

    def last_logits(self, circuit: pd.DataFrame) -> Tensor:
        """[4,vocab], logits after the last token: of the text, of the corrupt text, of the text with all writes of the
        corrupt text, and with all but those of a circuit."""
        return self.graph.own_tracer().last_logits([self.writes, self._writes_outside(circuit)]).cpu()

    def _writes_outside(self, circuit: pd.DataFrame) -> pd.DataFrame:
        inside = self.writes.merge(circuit[_PLACE], on=_PLACE).node_id
        return self.writes[~self.writes.node_id.isin(inside)]


@dataclass(frozen=True, eq=False)
class Task:
    """What texts of one form have in common: the writes that matter in all of them."""

    effects: pd.DataFrame
    """A row for each role, layer and head: ``effect``, the mean over texts of what the metric loses where the write is
    replaced by that of the corrupt text, and ``spread``, the standard deviation. Largest |effect| first."""
    cases: Sequence[Case]

    def check(self, n: int = 8) -> pd.DataFrame:
        """Whether there is a task: the model gives the targets, and they depend on the text more than the targets of
        other pairs do.

        A share that a circuit keeps does not tell: the writes that carry the word keep most of *any* difference between
        the two texts, also of logits that nobody asked for. So each pair is asked for the targets of all other pairs as
        well, which is what answers that are shuffled among pairs are on average.

        Args:
            n: writes of the circuit, the largest of `effects`.

        Returns: the rows "own" and "shuffled", each with the columns ``pairs`` (how many; the second row leaves out
        targets that are the pair's own target or what it is compared with, and is NaN where all are), ``above`` (share
        of texts after which the logit of the target is above that of what it is compared with), ``first`` (share in
        which it is the largest logit of all), ``effect`` (mean over pairs of the metric of the text less that of the
        corrupt text), ``error`` (its standard error) and ``kept`` (median share of the effect of all writes that the
        circuit keeps).

        Warns (`PredictionWarning`) where the target is not above in most pairs; where the effect is not larger than two
        standard errors; and where it is not larger than that of shuffled answers, by two standard errors of the
        difference in each pair.

        Cost: two passes for each text.
        """
        circuit = self.effects[:n]
        table = pd.concat(self._answers_of_pairs(circuit))
        # A pair counts once, however many targets of other pairs it is asked for.
        by_pair = table.groupby(["answers", "pair"])[["above", "first", "effect"]].mean()
        by_answers = by_pair.groupby("answers")
        rows = by_answers.mean()
        rows["pairs"] = by_answers.size()
        rows["error"] = by_answers.effect.sem()
        rows["kept"] = table.groupby("answers").kept.median()
        rows = rows.reindex(["own", "shuffled"])[["pairs", "above", "first", "effect", "error", "kept"]]
        effects = by_pair.effect.unstack("answers").reindex(columns=rows.index)
        if doubts := "; ".join(_task_doubts(rows, (effects.own - effects.shuffled).dropna())):
            warnings.warn(
                f"task: expected a model that gives the targets because of the texts, but {doubts}. A circuit of this "
                "task carries what differs between the texts, not the answer",
                PredictionWarning,
                stacklevel=2,
            )
        return rows

    def _answers_of_pairs(self, circuit: pd.DataFrame) -> Iterator[pd.DataFrame]:
        """Of each pair what the model says of each target: its own, and those of other pairs."""
        targets = sorted({case.answer[0] for case in self.cases})
        for number, case in enumerate(self.cases):
            own, against = case.answer
            logits = case.last_logits(circuit).double()
            asked = np.array([target for target in targets if target != against])
            text, corrupt, none, kept = logits[:, asked] - logits[:, [against]]
            answers = {
                "answers": np.where(asked == own, "own", "shuffled"),
                "pair": number,
                "above": text > 0,
                "first": asked == int(logits[0].argmax()),
                "effect": text - corrupt,
                "kept": (kept - none) / (text - none),
            }
            yield pd.DataFrame(answers)

    def faithful(self, held_out: Task, sizes: Sequence[int] = (1, 2, 4, 8, 16), draws: int = DRAWS) -> pd.DataFrame:
        """How much the largest writes of these texts keep in texts that they were not chosen from. A share says nothing
        about whether there is a task: look at `check` of both first.

        Args:
            held_out: other texts of the same form.
            sizes: numbers of writes.
            draws: random circuits of each size.

        Returns: a row for each size: ``n``, ``kept`` (median over the held-out texts of the share of the effect of all
        writes: 1 as the model, 0 as with all writes of the corrupt text), ``low`` and ``high`` (least and largest), and
        ``random`` and ``random_high`` (median and largest share over all texts of the ``draws`` random circuits of as
        many writes; more circuits would reach more).

        Raises:
            InputError: the texts have other roles.

        Cost: one pass and ``draws`` for each text and size, and two for each text; several circuits run in a pass.
        """
        ours, theirs = ({*task.effects.role} for task in (self, held_out))
        if ours != theirs:
            raise InputError(f"held_out: expected roles {sorted(ours)}, got {sorted(theirs)}; name them with roles=")
        circuits = [self.effects[:n] for n in sizes]
        kept = np.array([case.kept(circuits) for case in held_out.cases])
        drawn = [order[:n] for n in sizes for order in random_orders(self.effects, draws)]
        random = np.array([case.kept(drawn) for case in held_out.cases]).reshape(len(kept), len(circuits), -1)
        columns = {"n": list(sizes), "kept": np.median(kept, 0), "low": kept.min(0), "high": kept.max(0)}
        return pd.DataFrame(columns | {"random": np.median(random, (0, 2)), "random_high": random.max((0, 2))})


def _task_doubts(rows: pd.DataFrame, excess: pd.Series) -> Iterator[str]:
    """Why there may be no task, by what `Task.check` returns, and by how much larger the effect of each pair's own
    target is than that of others."""
    above, effect, error = rows.loc["own", ["above", "effect", "error"]].to_numpy(float)
    if not above > 0.5:
        yield f"the model prefers the target in {above:.0%} of the pairs"
    if not effect > 2 * error:
        yield f"the effect is {effect:.2g} with a standard error of {error:.2g}"
    if len(excess) and not excess.mean() > 2 * cast(float, excess.sem()):
        shuffled = rows.effect.shuffled
        yield f"answers that are shuffled among pairs have as large an effect, {shuffled:.2g} against {effect:.2g}"


def case_of(graph: Graph, answer: tuple[int, ...], names: Sequence[str]) -> Case:
    """A text whose tokens have these roles."""
    length = len(cast(Sequence[str], graph.metadata["tokens"]))
    if len(names) != length:
        raise InputError(f"roles: expected {length} of {graph.metadata['title']}, a token each, got {len(names)}")
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    role = writes.position.map(dict(enumerate(names)))
    return Case(graph, answer, writes.assign(role=role, effect=writes.measured.fillna(writes.predicted)))


def task_of(cases: Sequence[Case]) -> Task:
    """What several texts have in common."""
    if len({frozenset(case.writes.role) for case in cases}) != 1:
        counts = sorted({case.writes.role.nunique() for case in cases}) or "no"
        raise InputError(f"pairs: expected texts of the same roles, got {counts} roles; name them with roles=")
    by_place = pd.concat([case.writes for case in cases]).groupby(_PLACE, sort=False).effect
    effects = pd.DataFrame({"effect": by_place.mean(), "spread": by_place.std()}).reset_index()
    return Task(effects.loc[by_size(effects.effect)].reset_index(drop=True), cases)
