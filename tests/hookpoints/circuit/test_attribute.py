"""Graphs: parts add up in every family, edges are what runs with changed factors do, and bad input is named."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from remembering import drawn_ids
from tiny_models import VOCAB, KeepFloat64, hooked_in_float64, make_hf
from torch import Tensor
from torch.nn import functional as F

from hookpoints import Graph, HookedRecurrent, Recurrence, WriteEdit, attribute
from hookpoints.circuit.atoms import atoms_of
from hookpoints.circuit.nodes import write_attribution
from hookpoints.circuit.ports import change_for, ports_of, ports_of_output
from hookpoints.circuit.tables import Node, random_orders
from hookpoints.errors import InputError, PredictionWarning, UnknownHookError, UnsupportedModelError
from hookpoints.files import sealed_json

SEQUENCE = drawn_ids(1, 16, seed=3)
OTHER = drawn_ids(1, 16, seed=4)
SMALL: dict[str, Any] = {"measure": 3, "targets": 1}


def difference(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1, 9]


@pytest.fixture(scope="module")
def graph(_model64: HookedRecurrent) -> Graph:
    """Of a Gated DeltaNet model in float64."""
    with KeepFloat64():
        return attribute(SEQUENCE, _model64, [5], against=9, measure=40, targets=4)


def test_a_direct_edge_is_what_the_last_stream_without_the_source_gives(hooked64: HookedRecurrent) -> None:
    """In every family: of an MLP at the last token, and of all nodes of others nothing."""
    if not hooked64.attachment.layout.is_chain:
        with pytest.raises(UnsupportedModelError, match="write_attribution works"):
            attribute(SEQUENCE, hooked64, [5])
        return
    graph = attribute(SEQUENCE, hooked64, [5], against=9, **SMALL)
    _, cache = hooked64.run_with_cache(SEQUENCE)
    stream = cache[f"blocks.{hooked64.cfg.n_layers - 1}.hook_resid_post"][:, -1:]
    final = hooked64.attachment.layout.final_norm
    direct: Any = graph.edges[graph.edges.port == "direct"].merge(graph.nodes, left_on="source", right_on="node_id")
    last = SEQUENCE.shape[1] - 1
    assert len(direct) > 3
    for row in direct[direct.feature_type.isin(["mlp", "embedding"])].itertuples():
        name = "hook_embed" if row.layer < 0 else f"blocks.{row.layer}.hook_mlp_out"
        if row.layer < 0:
            name = "blocks.0.hook_resid_pre"
        added = cache[name][:, -1:] if row.position == last else torch.zeros(())
        with torch.no_grad():
            left = stream - added
            logits = hooked64.unembed(left if final is None else hooked64.ln_final(left))
            metric = float(difference(hooked64(SEQUENCE)))
        assert graph.metadata["metric"] == pytest.approx(metric, abs=1e-10)
        assert row.measured_x == pytest.approx(metric - float(difference(logits)), abs=1e-9), row.source
    ports: Any = graph.edges[~graph.edges.port.isin(["direct", "input"])]
    apart = hooked64.recurrence(SEQUENCE, hooked64.cfg.recurrent_layers[0]).rates is not None
    assert ("query" in {*ports.port}) != apart  # it needs one pattern for all value channels
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    expected = write_attribution(hooked64, SEQUENCE, difference)
    assert writes.predicted.tolist() == pytest.approx(expected.attribution.tolist(), abs=1e-12)
    assert writes.measured.notna().sum() == min(3 + 20, len(writes))


def test_what_a_block_adds_without_a_hook_is_put_back_on_a_direct_path() -> None:
    """Here a function of the stream, in a block of a model that somebody changed."""
    hf = make_hf().double()
    block: Any = hf.model.layers[1]
    plain = block.forward

    def adding(*args: Any, **kwargs: Any) -> Tensor:
        stream = plain(*args, **kwargs)
        return stream + stream.sin()

    block.forward = adding
    with KeepFloat64():
        model = HookedRecurrent.from_hf(hf)
        graph = attribute(SEQUENCE, model, [5], against=9, measure=40, targets=1)
        logits, cache = model.run_with_cache(SEQUENCE)
        left = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"] - cache["blocks.0.hook_resid_pre"]
        without = model.unembed(model.ln_final(left))
    row: Any = graph.edges.query(f"port == 'direct' and source == 'E@{SEQUENCE.shape[1] - 1}'").iloc[0]
    assert row.measured == pytest.approx(float(difference(logits) - difference(without)), abs=1e-9)


def taken_by(tracer: Any, source: Node, port: Any) -> Any:
    """What a source takes off the side of a port."""
    paths = tracer._direct_paths([source], [port])
    assert paths.sources == [[source]]
    return paths.taken[0]


@pytest.mark.usefixtures("_keep_float64")
@pytest.mark.parametrize(("model_type", "corrupt"), [("qwen3_5", None), ("qwen3_5", OTHER), ("lara_mini", None)])
def test_nodes_are_measured_by_runs_without_them(model_type: str, corrupt: Tensor | None) -> None:
    """Also where runs choose other experts, and some choose none."""
    model64 = hooked_in_float64(model_type)
    graph = attribute(SEQUENCE, model64, [5], against=9, corrupt=corrupt, measure=20, targets=0)
    names = {"mlp": "blocks.{l}.hook_mlp_out", "attn": "blocks.{l}.attn.hook_z", "embedding": "hook_embed"}
    _, values = model64.run_with_cache(SEQUENCE if corrupt is None else corrupt)
    with torch.no_grad():
        plain = float(difference(model64(SEQUENCE)))
    for kind, hook in names.items():
        rows = graph.nodes[(graph.nodes.feature_type == kind) & graph.nodes.measured.notna()]
        assert len(rows)
        for row in rows.head(3).itertuples():
            name = hook.format(l=row.layer)
            other = values[name][0, row.position] * (0 if corrupt is None else 1)  # type: ignore[index]
            value = other if row.head < 0 else other[row.head]  # type: ignore[index]
            swap: Any = partial(with_part, at=row.position, head=row.head, value=value)
            with torch.no_grad():
                left = float(difference(model64.run_with_hooks(SEQUENCE, fwd_hooks=[(name, swap)])))
            assert row.measured == pytest.approx(plain - left, abs=1e-9), row.node_id
    if corrupt is not None:  # a write is replaced by that of the other text, key and value
        row: Any = next(graph.nodes.query("feature_type == 'write' and measured.notna()").itertuples())
        r, at = model64.recurrence(corrupt, row.layer), (0, row.position, row.head)
        edit = WriteEdit(row.layer, row.head, row.position, r.k[at], r.u[at], mode="replace")
        with torch.no_grad(), model64.edits(edit):
            assert row.measured == pytest.approx(plain - float(difference(model64(SEQUENCE))), abs=1e-9)


def without_mlp(model: HookedRecurrent, layer: int, token: int) -> Any:
    """Factors of block ``layer`` without what the MLP below added at a token, everything else as it is."""
    _, cache = model.run_with_cache(SEQUENCE, names_filter=f"blocks.{layer - 1}.hook_mlp_out")
    added = cache[f"blocks.{layer - 1}.hook_mlp_out"][0, token]
    take: Any = (f"blocks.{layer}.hook_resid_pre", partial(less, at=token, taken=added))
    with torch.no_grad(), model.recording() as record:
        model.run_with_hooks(SEQUENCE, fwd_hooks=[take])
    return record[layer].recurrence


def gradient_at(model: HookedRecurrent, name: str) -> Tensor:
    """The metric's gradient by what a hook sees."""
    leaves: list[Tensor] = []

    def begin(x: Tensor, hook: object) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    value = difference(model.run_with_hooks(SEQUENCE, fwd_hooks=[(name, begin)]))
    return torch.autograd.grad(value, leaves)[0]


@pytest.mark.parametrize(("layer", "position", "read"), [(1, 5, 9), (2, 7, 15), (2, 15, 15)])
def test_edges_are_measured_by_runs_with_that_side_changed(
    model64: HookedRecurrent, graph: Graph, layer: int, position: int, read: int
) -> None:
    """Value and key: the write is replaced. Query: its weight in the reading token's pattern is. Gate: the transition
    of its token is. To first order, the change of that side counts times the metric's gradient by it."""
    tracer: Any = graph.tracer
    head = 1
    clean = model64.recurrence(SEQUENCE, layer)
    for port in ports_of(
        Node("write", layer, head, position), clean, tracer.gradients[f"blocks.{layer}.mixer.hook_read"], read
    ):
        taken = taken_by(tracer, Node("mlp", layer - 1, -1, port.at), port)
        (effect,) = tracer.runs.effects(change_for(port, tracer.text, taken))
        changed = without_mlp(model64, layer, port.at)
        at = (0, position, head)
        hooks: list[Any] = []
        edit: Any = ()
        if port.name in ("value", "key"):
            gradient = gradient_at(model64, f"blocks.{layer}.mixer.hook_write_{port.name}")[at]
            k = changed.k if port.name == "key" else clean.k
            u = changed.u if port.name == "value" else clean.u
            side = ((clean.k - changed.k) if port.name == "key" else (clean.u - changed.u))[at]
            torch.testing.assert_close(port.worth(taken), (side @ gradient)[None], rtol=1e-9, atol=1e-12)
            edit = WriteEdit(layer, head, position, keys=k[at], values=u[at], mode="replace")
        elif port.name == "query":
            pattern = clean.attention()
            pattern[0, head, read, position] = clean.replace(q=changed.q).attention()[0, head, read, position]
            hooks = [(f"blocks.{layer}.mixer.hook_pattern", partial(put, value=pattern))]
        else:
            fields = {name: getattr(clean, name).clone() for name in ("log_decay", "a", "b")}
            for name, field in fields.items():
                field[at] = getattr(changed, name)[at]
            hooks = [(f"blocks.{layer}.mixer.hook_read", partial(put, value=clean.replace(**fields).outputs()))]
        with torch.no_grad(), model64.edits(edit):
            logits = model64.run_with_hooks(SEQUENCE, fwd_hooks=hooks)
        assert effect == pytest.approx(tracer.runs.plain - float(difference(logits)), abs=1e-9), port.name
        assert abs(effect) > 1e-8


def put(x: Tensor, hook: object, value: Tensor) -> Tensor:
    return value.to(x)


def with_part(x: Tensor, hook: object, at: int, head: int, value: Tensor) -> Tensor:
    """``x`` [1,T,...] with another value at a token, or at a head of it."""
    x = x.clone()
    x[(0, at) if head < 0 else (0, at, head)] = value
    return x


@pytest.mark.parametrize("name", ["query", "key", "value", "gate"])
def test_edges_into_a_softmax_head_compute_its_pattern_again(model64: HookedRecurrent, graph: Graph, name: str) -> None:
    """The side of the head is that of a run without what the MLP below added, and the others are as they are."""
    tracer: Any = graph.tracer
    layer, head, at = 3, 1, 15
    token = at if name in ("query", "gate") else 7
    ports = ports_of_output(Node("attn", layer, head, at), tracer.gradients[f"blocks.{layer}.attn.hook_z"])
    port = next(port for port in ports if port.name == name)
    taken = taken_by(tracer, Node("mlp", layer - 1, -1, token), port)
    (effect,) = tracer.runs.effects(change_for(port, tracer.text, taken))
    attn = f"blocks.{layer}.attn"
    below = f"blocks.{layer - 1}.hook_mlp_out"
    _, clean = model64.run_with_cache(SEQUENCE)
    take: Any = (f"blocks.{layer}.hook_resid_pre", partial(less, at=token, taken=clean[below][0, token]))
    with torch.no_grad(), model64.hooks([take]):
        _, changed = model64.run_with_cache(SEQUENCE)
    hooks: list[Any] = [(f"{attn}.hook_{x}", partial(put, value=clean[f"{attn}.hook_{x}"])) for x in "qkv"]
    hooks.append(take)
    if name != "gate":
        hook = f"{attn}.hook_{name[0]}"
        hooks = [(hook, partial(put, value=changed[hook]))]
    with torch.no_grad(), model64.hooks(hooks):
        _, patched = model64.run_with_cache(SEQUENCE, names_filter=f"{attn}.hook_z")
    z = clean[f"{attn}.hook_z"].clone()
    z[0, at, head] = patched[f"{attn}.hook_z"][0, at, head]
    with torch.no_grad():
        logits = model64.run_with_hooks(SEQUENCE, fwd_hooks=[(f"{attn}.hook_z", partial(put, value=z))])
    assert effect == pytest.approx(tracer.runs.plain - float(difference(logits)), abs=1e-9)
    assert abs(effect) > 1e-9
    assert {*graph.edges[graph.edges.target.str.startswith("L3A")].port} == {"query", "key", "value", "gate"}


@pytest.mark.parametrize("model_type", ["kimi_linear", "falcon_h1"])
def test_heads_of_any_attention_have_ports(model_type: str) -> None:
    """Also where its queries and keys have no hooks, or a recurrence is beside it: what is before a token changes the
    keys and values that it reads, and what is at it its query and gate as well."""
    model = hooked_in_float64(model_type)
    with KeepFloat64():
        graph = attribute(SEQUENCE, model, [5], measure=40, targets=4)
        tracer: Any = graph.tracer
        into = graph.edges[graph.edges.target.str.contains("A")]
        assert {"value", "key", "query"} <= {*into.port}  # not all have gates
        layer = max(model.cfg.attention)
        name = f"blocks.{layer}.attn.hook_z"
        for port in ports_of_output(Node("attn", layer, 1, 9), tracer.gradients[name]):
            for at in (4, 9):
                taken = taken_by(tracer, Node("mlp", layer - 1, -1, at), port)
                if port.name != "gate" or at == 4:
                    assert bool(taken.abs().max() > 1e-9) == (at == 9 or port.name in ("key", "value"))


def test_an_edge_into_an_mlp_is_a_run_with_its_input_changed(ruled64: HookedRecurrent) -> None:
    """In every family, of the MLP below and of a write of the same block: what the MLP then adds at its token, and
    nothing else, is another."""
    if not ruled64.attachment.layout.is_chain:
        pytest.skip("its blocks are no chain along one residual stream")
    layer = ruled64.cfg.recurrent_layers[-1]
    out, at = f"blocks.{layer}.hook_mlp_out", SEQUENCE.shape[1] - 1
    if out not in ruled64.hook_dict:
        pytest.skip("its blocks have no MLP, or several")
    tracer: Any = attribute(SEQUENCE, ruled64, [5], against=9, measure=3, targets=0).tracer
    (port,) = ports_of_output(Node("mlp", layer, -1, at), tracer.gradients[out])
    below = Node("mlp" if layer else "embedding", layer - 1, -1, at)
    write = Node("write", layer, ruled64.cfg.layer(layer).H - 1, 9)
    given = tracer._direct_paths([below, write], [port]).taken[0]
    _, clean = ruled64.run_with_cache(SEQUENCE)
    taken = clean[f"blocks.{layer - 1}.hook_mlp_out" if layer else "hook_embed"][0, at]
    hooks: list[Any] = [(f"blocks.{layer}.hook_resid_pre", partial(less, at=at, taken=taken))]
    for name in (f"blocks.{layer}.hook_mixer_out", f"blocks.{layer}.hook_attn_out"):
        hooks += [(name, partial(put, value=clean[name]))] if name in clean else []
    expected = [clean[out]]
    for hook, edit in ((hooks, ()), ([], WriteEdit(layer, write.head, 9, mode="delete"))):
        with torch.no_grad(), ruled64.hooks(hook), ruled64.edits(edit):
            expected.append(ruled64.run_with_cache(SEQUENCE, names_filter=out)[1][out])
    sides = torch.cat(expected)[:, at]
    torch.testing.assert_close(given, sides[:1] - sides[1:], rtol=1e-9, atol=1e-12)
    effects = tracer.runs.effects(change_for(port, tracer.text, given))
    for effect, value in zip(effects, sides[1:]):
        swap: Any = partial(with_part, at=at, head=-1, value=value)
        with torch.no_grad():
            left = float(difference(ruled64.run_with_hooks(SEQUENCE, fwd_hooks=[(out, swap)])))
        assert effect == pytest.approx(tracer.runs.plain - left, abs=1e-9)
    assert abs(effects[0]) > 1e-8 and {"input"} == {port.name}


def test_a_graph_is_saved_and_read(graph: Graph, tmp_path: Path) -> None:
    """Also in another layout; and what is no graph, or has other numbers, is refused by its name."""
    file = graph.save(tmp_path / "graph.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=2))
    loaded = Graph.load(file)
    pd.testing.assert_frame_equal(loaded.nodes, graph.nodes)
    pd.testing.assert_frame_equal(loaded.edges, graph.edges)
    assert loaded.metadata == json.loads(json.dumps(dict(graph.metadata)))
    with pytest.raises(InputError, match="has no model"):
        loaded.why("L1H0@3")
    content["edges"][0]["measured"] += 1
    rows = {"schema": 3, "metadata": {}, "nodes": [{"layer": 1}], "edges": []}
    for bad in ("{", json.dumps(content), sealed_json({"schema": 7}), sealed_json(rows)):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"graph\.json"):
            Graph.load(file)


@pytest.mark.usefixtures("_keep_float64")
def test_why_asks_for_any_write_head_or_mlp(graph: Graph) -> None:
    """Also one that has no edges yet; those of one that has are the same. Of a write by any token that reads it."""
    table = graph.why("L2H1@5", read=12)
    assert set(table.port) == {"value", "key", "query", "gate"} and set(table.target) == {"L2H1@5"}
    assert set(table[table.port == "query"].read) == {12}
    explained = {*graph.edges.target} - {"logit"}
    for name in sorted(explained)[::4]:
        before = graph.edges[graph.edges.target == name].predicted
        assert sorted(graph.why(name).predicted) == pytest.approx(sorted(before), rel=1e-7)
    new = [next(name for name in ("L3A0@15", "L3A1@15") if name not in explained), "MLP1@3"]
    for name, ports in zip(new, ({"value", "key", "query", "gate"}, {"input"})):
        assert {*graph.why(name).port} == ports and graph.why(name).measured.abs().max() > 0
    for name, read in (("L2H9@5", None), ("E@3", None), ("L2H1@5", 4), (new[1], 9)):
        with pytest.raises(InputError, match="node: expected" if read is None else "read: expected"):
            graph.why(name, read)


@pytest.mark.usefixtures("_keep_float64")
def test_sufficient_writes_are_those_of_the_largest_effect(model64: HookedRecurrent, graph: Graph) -> None:
    """Of either sign, and the metric is that of a run in which all other writes are 0: a layer keeps its own writes,
    and those of no other. The share is of what all writes do; random sets are told by their median and maximum."""
    writes: Any = graph.nodes[graph.nodes.feature_type == "write"]
    curve = graph.sufficient([12, len(writes), len(writes) + 1])
    best = writes.loc[writes.measured.abs().nlargest(12).index]
    assert best.layer.nunique() > 1 and (best.measured < 0).any() and curve.n.tolist() == [12, len(writes)]
    sets = [best, writes[:0], *(order[:12] for order in random_orders(writes, 30))]
    metrics = []
    for kept in sets:
        hooks: list[Any] = []
        for layer in model64.cfg.recurrent_layers:
            hooks.append((f"blocks.{layer}.mixer.hook_write_value", partial(only, kept=kept[kept.layer == layer])))
        with torch.no_grad():
            metrics.append(float(difference(model64.run_with_hooks(SEQUENCE, fwd_hooks=hooks))))
    metric, none, *random = metrics
    shares = (np.array(random) - none) / (float(curve.metric[1]) - none)
    row = curve.iloc[0]
    assert row.metric == pytest.approx(metric, abs=1e-9)
    assert [row.random, row.random_high] == pytest.approx([np.median(shares), shares.max()], abs=1e-9)
    every = curve.iloc[1]
    assert [every.kept, every.random, every.metric] == pytest.approx([1, 1, graph.metadata["metric"]], abs=1e-9)
    assert graph.keep(best.node_id).metric == pytest.approx(metric, abs=1e-9) and every.same_answer
    for ask, message in (
        (lambda: graph.sufficient(0), "sizes: expected some of 1 to"),
        (lambda: graph.sufficient(8, draws=0), "draws: expected at least one"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


@pytest.mark.usefixtures("_keep_float64")
def test_sets_of_nodes_are_taken_out_in_one_run(model64: HookedRecurrent, graph: Graph) -> None:
    """Of all kinds, as by hooks and edits by hand; what is kept is all that is not taken out of the same kinds."""
    ids = ["L1H1@5", "L3A0@15", "MLP2@9", "E@0"]
    nothing = torch.zeros(())
    taken: Any = [("hook_embed", partial(with_part, at=0, head=-1, value=nothing))]
    taken.append(("blocks.2.hook_mlp_out", partial(with_part, at=9, head=-1, value=nothing)))
    taken.append(("blocks.3.attn.hook_z", partial(with_part, at=15, head=0, value=nothing)))
    with torch.no_grad(), model64.edits(WriteEdit(1, 1, 5, mode="delete")):
        left = float(difference(model64.run_with_hooks(SEQUENCE, fwd_hooks=taken)))
    without = graph.without(ids)
    assert without.metric == pytest.approx(left, abs=1e-9)
    tokens = SEQUENCE
    with torch.no_grad(), model64.hooks(graph.hooks(ids)):  # each pass from the first token on, and from a cache
        for _ in range(4):
            tokens = torch.cat([tokens, model64(tokens)[:, -1:].argmax(-1)], 1)
        assert model64.generate(SEQUENCE, 4, do_sample=False).equal(tokens)
    assert not model64.generate(SEQUENCE, 4, do_sample=False).equal(tokens)
    others = graph.nodes[~graph.nodes.node_id.isin(ids)].node_id
    assert graph.keep(others).metric == pytest.approx(left, abs=1e-9)
    kept = model64.run_with_hooks(SEQUENCE, fwd_hooks=graph.hooks(others, kept=True))
    assert difference(kept).item() == pytest.approx(left, abs=1e-9)
    for wrong in (["L9H9@99"], []):
        with pytest.raises(InputError, match="nodes: expected ids"):
            graph.without(wrong)


def test_a_curve_of_deleted_writes_asks_for_a_corrupt_text(embedded: HookedRecurrent) -> None:
    """Where it leaves 0 to 1.5."""
    text = "The Secretary of the Treasury will report. The report of the Secretary of the"
    ask = partial(attribute, text, embedded, [" Treasury"], against=" Navy", targets=0, measure=20)
    with pytest.warns(PredictionWarning, match="corrupt="):
        ask().sufficient([2, 4], draws=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PredictionWarning)
        ask(corrupt=text.replace("Treasury", "Navy")).sufficient([1, 4], draws=3)


def only(x: Tensor, hook: object, kept: pd.DataFrame) -> Tensor:
    """0 but at ``kept`` tokens and heads."""
    at = (0, [*kept.position], [*kept["head"]])
    left = torch.zeros_like(x)
    left[at] = x[at]
    return left


def test_writes_that_no_prediction_chose_are_drawn(model64: HookedRecurrent) -> None:
    """Twenty of them, and the largest is told; they are measured. Of few nodes all are."""
    few = attribute(SEQUENCE, model64, [5], against=9, corrupt=OTHER, measure=4, targets=0)
    writes: Any = few.nodes[few.nodes.feature_type == "write"]
    chosen = writes.predicted.abs().nlargest(4).index
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PredictionWarning)  # predictions of random models need not be good
        check = few.check()
    assert writes.measured[chosen].notna().all()
    assert (check.n, check.writes, check.drawn) == (24, len(writes), 20)
    assert check.largest_drawn == writes.drop(chosen).measured.abs().max()
    assert str(check).startswith("exact: 24 of ")
    assert attribute(SEQUENCE, model64, [5], targets=0).nodes.measured.notna().all()


def test_half_of_what_is_measured_is_largest_in_size_and_gradient(model64: HookedRecurrent) -> None:
    """The other half by predictions; with a corrupt text, whose predictions hold, all."""
    names = [f"blocks.{layer}.mixer.hook_write_value" for layer in model64.cfg.recurrent_layers]
    _, cache = model64.run_with_cache(SEQUENCE)
    sizes = [cache[name][0].norm(dim=-1) * gradient_at(model64, name)[0].norm(dim=-1) for name in names]
    for corrupt in (None, OTHER):
        nodes = attribute(SEQUENCE, model64, [5], against=9, corrupt=corrupt, measure=10, targets=0).nodes
        rows: Any = nodes[nodes.feature_type == "write"].reset_index()
        best = rows.predicted.abs().nlargest(10).index
        if corrupt is None:
            bounds = pd.Series(torch.cat([size.flatten() for size in sizes])).drop(best[:5])
            best = [*best[:5], *bounds.nlargest(5).index]
        assert rows.measured[best].notna().all()


def test_a_query_is_that_of_the_token_through_which_a_write_does_most(graph: Graph) -> None:
    """For the metric or against it: by what the head reads of that write alone."""
    tracer: Any = graph.tracer
    clean, gradients = tracer.text.recurrences[1], tracer.gradients["blocks.1.mixer.hook_read"]
    for position in range(SEQUENCE.shape[1]):
        alone = torch.zeros_like(clean.u)
        alone[0, position, 1] = clean.u[0, position, 1]
        reads = clean.replace(u=alone).outputs()[0, :, 1]
        query = ports_of(Node("write", 1, 1, position), clean, gradients)[-1]
        assert query.name == "query" and query.at == (reads * gradients[0, :, 1]).sum(-1).abs().argmax()


def test_a_model_that_gives_all_logits_has_the_same_graph(model64: HookedRecurrent, monkeypatch: Any) -> None:
    """One of a class that somebody wrote, whose forward takes what Hugging Face's generate needs."""
    graphs = [attribute(SEQUENCE, model64, [5], **SMALL)]
    whole = type(model64.hf_model).forward

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None):
        return whole(self, input_ids, attention_mask, None, past_key_values, inputs_embeds, use_cache=use_cache)

    monkeypatch.setattr(type(model64.hf_model), "forward", forward)
    other = HookedRecurrent.from_hf(make_hf().double())
    graphs.append(attribute(SEQUENCE, other, [5], **SMALL))
    for column in ("predicted", "measured"):
        first, second = (graph.nodes[column] for graph in graphs)
        pd.testing.assert_series_equal(first, second, rtol=1e-8, atol=1e-10)


def test_the_largest_nodes_that_were_measured_are_explained(model64: HookedRecurrent, graph: Graph) -> None:
    """Of either sign."""
    for kind, n in (("write", 4), ("mlp", 4), ("attn", 1)):
        rows: Any = graph.nodes[graph.nodes.feature_type == kind]
        assert {*rows.loc[rows.measured.abs().nlargest(n).index].node_id} <= {*graph.edges.target}
    few = attribute(SEQUENCE, model64, [5], measure=1, targets=4)
    measured = few.nodes[few.nodes.measured.notna()].node_id
    assert {*few.edges.target} <= {*measured, "logit"}
    assert {*few.edges[few.edges.port == "direct"].source} <= {*measured}


def test_a_pruned_graph_grows_by_the_largest_edge_into_what_it_has(graph: Graph) -> None:
    """Of either sign; so that each of its nodes has a path to the logit."""
    pruned = graph.prune(5)
    nodes: Any = graph.nodes
    tried: Any = graph.edges[graph.edges.measured.notna() & graph.edges.source.isin(nodes.node_id)]
    joined = ["logit"]
    while len(joined) < 6:
        near = tried[tried.target.isin(joined) & ~tried.source.isin(joined)]
        joined.append(near.loc[near.measured.abs().idxmax()].source)
    assert {*pruned.nodes.node_id} == {*joined[1:]} and (tried.measured < 0).any()
    sources: Any = pruned.edges.source[pruned.edges.source.isin(nodes.node_id)]
    assert {*sources} == {*joined[1:]} and {*pruned.edges.target} <= {*joined}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: attribute(SEQUENCE.repeat(2, 1), model, [5]), "one sequence"),
        (lambda model: attribute(SEQUENCE, model, [VOCAB]), "attribution_targets: expected token ids"),
        (lambda model: attribute(SEQUENCE, model, []), "at least one token"),
        (lambda model: attribute(SEQUENCE, model, [5], corrupt=OTHER[:, 1:]), "as many as the text has"),
        (lambda model: attribute(SEQUENCE, silent(model), corrupt=SEQUENCE.clone()), "corrupt: expected another text"),
        (lambda model: attribute(SEQUENCE, model, [5], measure=0), "measure"),
        (lambda model: attribute(SEQUENCE, model, [5], saes=[cast(Any, object())]), "writes or states"),
        (lambda model: attribute(SEQUENCE, model, [5], saes=atoms("blocks.1.mixer.heads.9.hook_state_vec")), "heads.9"),
        (
            lambda model: attribute(SEQUENCE, model, [5], saes=2 * atoms("blocks.1.mixer.heads.1.hook_state_vec")),
            "of each head",
        ),
        (lambda model: attribute(SEQUENCE, training(model), [5]), "training mode"),
        (lambda model: write_attribution(model, SEQUENCE, lambda logits: logits[0, -1]), "one finite number"),
    ],
)
def test_bad_input_is_named(ask: Callable[[HookedRecurrent], object], message: str) -> None:
    with pytest.raises((InputError, UnknownHookError), match=message):
        ask(HookedRecurrent.from_hf(make_hf()))


def silent(model: HookedRecurrent) -> HookedRecurrent:
    """One that fails where it is run."""
    model.hf_model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    return model


def training(model: HookedRecurrent) -> HookedRecurrent:
    model.train()
    return model


def test_quantized_weights_warn(model: HookedRecurrent) -> None:
    model.hf_model.is_quantized = True
    try:
        with pytest.warns(PredictionWarning, match="quantized"):
            attribute(SEQUENCE, model, [5], measure=3, targets=0)
    finally:
        del model.hf_model.is_quantized


class Atoms:
    """A dictionary in SAELens' interface, with random atoms, of which the first never fires, and a bias."""

    def __init__(self, name: str, width: int):
        random = torch.Generator().manual_seed(7)
        self.W_dec = torch.randn(6, width, generator=random, dtype=torch.float64) / width
        self.b_dec = self.W_dec.sum(0)
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=name))

    def encode(self, x: Tensor) -> Tensor:
        return F.pad(x @ self.W_dec[1:].T, (1, 0))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.b_dec


def atoms(name: str) -> list[Any]:
    """A list of one dictionary."""
    return [Atoms(name, 1)]


@pytest.mark.parametrize(("kind", "corrupt"), [("state", None), ("write", OTHER)], ids=["state", "write"])
def test_writes_and_states_are_taken_apart(ruled64: HookedRecurrent, kind: Any, corrupt: Tensor | None) -> None:
    """Predictions add up to the gradient's, and a part does what an edit by hand does."""
    layout = ruled64.attachment.layout
    if not layout.is_chain or layout.first_block_feeds_all:
        pytest.skip("its blocks are no chain along one residual stream")
    layer = ruled64.cfg.recurrent_layers[-1]
    shape = ruled64.cfg.layer(layer)
    head = shape.H - 1
    name = f"blocks.{layer}.mixer.heads.{head}.hook_write"
    sae: Any = Atoms(name.replace("write", f"{kind}_vec"), shape.K * shape.V)
    graph = attribute(SEQUENCE, ruled64, [5], against=9, corrupt=corrupt, saes=[sae], measure=3, targets=0)
    edges = graph.edges[graph.edges.port == "part"]
    position = graph.nodes[graph.nodes.node_id.isin(edges.source)].position.unique().item()
    assert {*edges.target} == {Node(kind, layer, head, position).node_id}
    r = ruled64.recurrence(SEQUENCE, layer)
    assert kind == "write" or position == largest_read(ruled64, layer, head) - r.read_before_write
    gradient = gradient_at(ruled64, name)[0]
    tracer: Any = graph.tracer
    for at in (position, 9):
        node = Node(kind, layer, head, at)
        table, _ = atoms_of(tracer, sae, node)
        wholes = [matrix_at(ruled64, text, node) for text in (SEQUENCE, corrupt)]
        weights = sae.encode(wholes[0].flatten()) - sae.encode(wholes[1].flatten())
        taken = {f"atom {row}": weights[row] * sae.W_dec[row] for row in range(1, 6)}
        taken["state"] = wholes[0] - wholes[1]
        parts = table[table.feature_type != "state"]
        assert parts.predicted.sum() == pytest.approx(float((taken["state"] * gradient[at]).sum()), rel=1e-9, abs=1e-12)
        assert len(parts) == 7 - (corrupt is not None)  # a bias is the same in both
        for row in table[table.feature_type.isin(["atom", "state"])].groupby("feature_type").head(2).itertuples():
            matrix = taken[str(row.node_id).partition(" ")[2]].view_as(gradient[at])
            with torch.no_grad(), ruled64.hooks(taking(r, node, matrix)):
                left = float(difference(ruled64(SEQUENCE)))
            assert row.measured == pytest.approx(tracer.runs.plain - left, abs=1e-9) and row.measured


def largest_read(model: HookedRecurrent, layer: int, head: int) -> int:
    """The token whose read by a head does most to the metric, to first order."""
    gradient = gradient_at(model, f"blocks.{layer}.mixer.hook_read")
    effects = (gradient * model.recurrence(SEQUENCE, layer).outputs())[0, :, head].sum(-1)
    return int(effects.abs().argmax())


def matrix_at(model: HookedRecurrent, text: Tensor | None, node: Node) -> Tensor:
    """[K,V], a write or a state; zeros without a text."""
    r = model.recurrence(SEQUENCE if text is None else text, node.layer).select(heads=node.head)
    matrices = r.states() if node.feature_type == "state" else r.write()
    return matrices[0, node.position, 0] * (text is not None)


def taking(r: Recurrence, node: Node, matrix: Tensor) -> list[Any]:
    """Hooks that take a matrix off a write or a state: tokens after it find the state without it, and its own token
    reads it so, unless it reads before it writes."""
    mixer = f"blocks.{node.layer}.mixer"
    head = f"{mixer}.heads.{node.head}"
    if node.feature_type == "write":
        return [(f"{head}.hook_write", partial(less, at=node.position, taken=matrix))]
    hooks = [(f"{head}.hook_state_in", partial(less, at=node.position + 1, taken=matrix))]
    if not r.read_before_write:
        read = torch.zeros_like(r.outputs()[0, 0])
        read[node.head] = matrix.T @ (r.scale * r.q[0, node.position, node.head])
        hooks.append((f"{mixer}.hook_read", partial(less, at=node.position, taken=read)))
    return hooks


def less(x: Tensor, hook: object, at: int, taken: Tensor) -> Tensor:
    """``x`` [1,T,...] with so much less at a token, if there is such a token."""
    x = x.clone()
    x[0, at : at + 1] -= taken
    return x


def test_words_of_a_picture_are_text(graph: Graph) -> None:
    """Names come from files of strangers; and nothing is loaded from a network."""
    picture = dataclasses.replace(graph, metadata={**graph.metadata, "title": "<script>&\x00"}).draw(width=390)
    assert ElementTree.fromstring(picture).attrib["viewBox"].split()[2] == "390"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|url\(", picture)
    assert "<script>&" in "".join(ElementTree.fromstring(picture).itertext())
