"""Graphs find the circuits of models whose circuit is known, and fail where there is none."""

from __future__ import annotations

import dataclasses
import warnings
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers

from hookpoints import Graph, HookedRecurrent, attribute, attribute_task, zoo
from hookpoints.circuit.task import Pair
from hookpoints.errors import InputError, PredictionWarning

SIZES = {"composition": {"pairs": 5}, "induction": {"words": 10}, "facts": {"pairs": 4}}
KNOWN = [name for name in zoo.names() if zoo.truth(name).holders]
pytestmark = pytest.mark.filterwarnings("ignore::hookpoints.errors.PredictionWarning")


class Question:
    """One question to a model of the zoo, with the places of its truth."""

    def __init__(self, name: str, seed: int = 11, **sizes: int):
        task: Any = zoo.task(name)
        sizes = sizes or SIZES.get(name, {"pairs": 6})
        batch = task.batch(1, torch.Generator().manual_seed(seed), **sizes)
        holder = next(holder for holder in zoo.truth(name).holders if holder.holds == "values")
        asked = int(batch.symbols["asked"][0, 0])
        self.tokens = batch.tokens[:, : int(batch.positions[0, 0]) + 1]
        self.answer = int(batch.answers[0, 0])
        self.value = int(batch.places["values"][0, asked])
        self.key = int(batch.places["keys"][0, asked])
        words = task.vocabulary
        values = batch.tokens[0, batch.places["values"][0]]
        self.told = sum(words[self.answer] in words[value].split("-") for value in values)
        """How many values tell the answer: the model falls back to another one."""
        self.others = [int(batch.tokens[0, place]) for place in batch.places["values"][0] if place != self.value]
        self.writes = {f"L{holder.layer}H{head}@{self.value + holder.offset}" for head in holder.heads}

    def graph(self, model: HookedRecurrent, answer: int | None = None, **settings: Any) -> Graph:
        settings = {"measure": 20, "targets": 3, "frozen": True} | settings
        return attribute(self.tokens, model, [self.answer if answer is None else answer], **settings)


def largest(graph: Graph, target: str, port: str, streams: bool) -> str:
    edges = graph.edges[(graph.edges.target == target) & (graph.edges.port == port) & graph.edges.measured.notna()]
    of_kind: Any = edges[edges.source.str.startswith("stream") == streams]
    return "" if of_kind.empty else str(of_kind.loc[of_kind.measured.idxmax()].source)


@pytest.mark.parametrize("name", KNOWN)
def test_the_holder_its_value_and_its_name_are_found(name: str) -> None:
    """Of questions whose answer one value tells. In Mamba-2 the token of a write sets its strength, dt, so that it is a
    source of the value as well."""
    model = HookedRecurrent.from_pretrained(name)
    shares = []
    tokens = []
    questions = (Question(name, seed) for seed in range(11, 20))
    for question in islice((question for question in questions if question.told == 1), 2):
        graph = question.graph(model, measure=8, targets=len(question.writes))
        writes = graph.nodes[graph.nodes.feature_type == "write"]
        first = writes.loc[writes.predicted.abs().nlargest(len(question.writes)).index].node_id
        shares.append(first.isin(question.writes).mean())
        for write in question.writes & {*graph.edges.target}:
            right = {f"stream@{question.value}"}
            if name.endswith("mamba2"):
                right.add(f"stream@{write.partition('@')[2]}")
            tokens.append(largest(graph, write, "value", True) in right)
            if name != "induction":  # whose key comes from the layer below
                tokens.append(largest(graph, write, "key", True) == f"stream@{question.key}")
    assert np.mean(shares) >= 0.8 and np.mean(tokens) >= 0.9, (shares, tokens)


def test_induction_shows_both_layers() -> None:
    """The key of the write that holds the answer comes from the first layer's write at the word before."""
    model = HookedRecurrent.from_pretrained("induction")
    for seed in (11, 12):
        question = Question("induction", seed)
        graph = question.graph(model, measure=12, targets=0)
        edges = graph.why(f"L1H0@{question.value}", read=question.tokens.shape[1] - 1)
        keys: Any = edges[(edges.port == "key") & edges.measured.notna() & ~edges.source.str.startswith("stream")]
        best = keys.loc[keys.measured.idxmax()]
        assert best.source == f"L0H0@{question.value - 1}" and best.measured > 3


def test_few_writes_are_sufficient_and_decide_the_answer_alone() -> None:
    """Random ones do not; and writes decide no answer that the model does not give."""
    model = HookedRecurrent.from_pretrained("recall")
    question = Question("recall")
    right = question.graph(model, targets=0)
    curve = right.sufficient(4).iloc[0]
    assert curve.same_answer and curve.kept > 0.8 and right.check().decisive
    assert not question.graph(model, question.others[0], targets=0).check().decisive


def test_an_untrained_model_does_not_pass_the_check() -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(zoo.path("recall"))
    model = HookedRecurrent.from_hf(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert attribute(Question("recall").tokens, model, targets=0).check().decisive is False


def test_a_task_whose_answers_are_shuffled_is_none() -> None:
    """The writes that carry the word keep any difference between two texts, also of logits that nobody asked for. What
    tells is whether the model gives the targets, and whether they depend on the text more than others do."""
    model = HookedRecurrent.from_pretrained("facts")
    asked = [("Ben", "Rome", "Oslo"), ("Ian", "Lima", "Cairo"), ("Zoe", "Paris", "Delhi")]
    form = "Ada keeps a parrot. {0} lives in {1}. {0} lives in"
    pairs = [Pair(form.format(n, a), form.format(n, b), a, b) for n, a, b in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PredictionWarning)
        task = attribute_task(pairs, model, measure=10)
        table: Any = task.check(4)
    # Each number by the logits of the two texts alone.
    targets = [model.to_single_token(pair.target) for pair in pairs]
    leads = np.zeros((3, 3, 2))
    best = []
    for row, pair in enumerate(pairs):
        logits = torch.stack([model(text)[0, -1] for text in (pair.text, pair.corrupt)]).detach()
        leads[row] = (logits[:, targets] - logits[:, [model.to_single_token(pair.against)]]).T
        best.append(int(logits[0].argmax()))
    is_own = np.eye(3, dtype=bool)
    effects = leads[..., 0] - leads[..., 1]
    for name, at in (("own", is_own), ("shuffled", ~is_own)):
        of_pairs = np.nanmean(np.where(at, effects, np.nan), 1)
        row = table.loc[name]
        assert (row.pairs, row.above) == (3, (leads[..., 0] > 0)[at].mean())
        assert row["first"] == np.mean([best[n] == targets[m] for n, m in np.argwhere(at)])
        assert [row.effect, row.error] == pytest.approx([of_pairs.mean(), of_pairs.std(ddof=1) / 3**0.5], rel=1e-4)
        assert row.kept > 0.8
    shares = [case.kept([task.effects[:4]])[0] for case in task.cases]
    assert table.kept.own == pytest.approx(np.median(shares), rel=1e-4) and table["first"].own == 1
    shuffled = [pair._replace(target=pairs[row - 1].target) for row, pair in enumerate(pairs)]
    with pytest.warns(PredictionWarning, match="shuffled among pairs"):
        wrong: Any = attribute_task(shuffled, model, measure=10).check()
    assert wrong.kept.own > 0.8 and wrong["first"].own == 0
    # It prefers what was told; and an effect of one pair has no error to compare it with.
    alone: Any = attribute_task(
        [pairs[0]._replace(target=pairs[0].against, against=pairs[0].target)], model, measure=10
    )
    with pytest.warns(PredictionWarning, match=r"prefers the target in 0%.*standard error of nan"):
        assert alone.check().loc["shuffled"].isna().all()


def test_writes_that_change_the_answer_to_one_that_nobody_named_do_not_decide(embedded: HookedRecurrent) -> None:
    """Without the eight largest the model says another token; what was asked for still leads what it is compared with
    by nearly as much."""
    form = "The Secretary of the {} will report. The report of the Secretary of the"
    told = form.format("War"), form.format("State")
    graph = attribute(told[0], embedded, [" Navy"], against=" State", corrupt=told[1], targets=0)
    writes: Any = graph.nodes[graph.nodes.feature_type == "write"]
    without = graph.without(writes.loc[writes.measured.abs().nlargest(8).index].node_id)
    assert graph.metadata["answer"] == " Navy" and not without.same
    assert without.metric > 0.8 * cast(float, graph.metadata["metric"])
    assert graph.check().decisive is False


@pytest.mark.parametrize("name", ["induction", "recall"])
def test_the_circuit_of_a_task_begins_with_the_write_that_is_known(name: str) -> None:
    """Two writes that three texts choose keep nearly all on others, and random pairs nothing. By chance the known one
    would be first in one of ten tasks, or of twenty."""
    pairs, roles = [], []
    for seed in range(12):
        question = Question(name, seed)
        last = question.tokens.shape[1] - 1
        corrupt = question.tokens.clone()
        corrupt[0, question.value] = question.others[0]
        told = int(question.tokens[0, question.value])
        if question.value + 2 < last and told != question.others[0]:
            pairs.append((question.tokens, corrupt, question.answer, question.others[0]))
            near = {question.value + offset: f"value+{offset}" for offset in range(3)} | {last: "question"}
            roles.append([near.get(place, "rest") for place in range(last + 1)])
    model = HookedRecurrent.from_pretrained(name)
    task, held_out = (attribute_task(pairs[at], model, roles[at]) for at in (slice(3), slice(3, 6)))
    holder = next(holder for holder in zoo.truth(name).holders if holder.holds == "values")
    assert tuple(task.effects.iloc[0, :3]) == (f"value+{holder.offset}", holder.layer, holder.heads[0])
    curve = task.faithful(held_out, [2], draws=8)
    assert curve.kept.item() > 0.9 and curve.random.abs().item() < 0.01
    one = task.effects.iloc[0]
    alike = [case.writes[(case.writes[["role", "layer", "head"]] == one[:3]).all(axis=1)] for case in task.cases]
    assert one.effect == pytest.approx(np.mean([rows.effect.item() for rows in alike]))
    assert task.effects.effect.abs().is_monotonic_decreasing


def test_texts_of_a_task_have_one_role_a_token_and_the_same_roles() -> None:
    model = HookedRecurrent.from_pretrained("facts")
    pair = "Ben lives in Rome. Ben lives in", "Ben lives in Oslo. Ben lives in", "Rome", "Oslo"
    plain, named = (attribute_task([pair], model, roles, measure=1) for roles in (None, [["a", *8 * ["b"]]]))
    assert {*named.effects.role} == {"a", "b"}
    for ask, message in (
        (lambda: attribute_task([pair], model, [["a"]], measure=1), "roles: expected 9 of "),
        (lambda: attribute_task([], model), "pairs: expected texts"),
        (lambda: plain.faithful(named), "held_out: expected roles"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


@pytest.mark.filterwarnings("default")
def test_random_effects_fail_the_check() -> None:
    model = HookedRecurrent.from_pretrained("recall")
    graph = Question("recall").graph(model)
    assert graph.check().r > 0.9
    measured = np.random.default_rng(0).permutation(graph.nodes.measured)
    with pytest.warns(PredictionWarning, match="correlation"):
        assert dataclasses.replace(graph, nodes=graph.nodes.assign(measured=measured)).check().r < 0.5
