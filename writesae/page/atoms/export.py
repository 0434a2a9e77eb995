"""Atoms and attribution graphs in the formats of Neuronpedia. It imports the batches of atoms that SAEDashboard writes
(`NeuronpediaDashboardBatch` of SAEDashboard 0.8.0), and shows graphs that fit its `graph-schema.json`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, write_attribution
from sae_lens_writesae.sae.target import HeadHook
from writesae.files import Json
from writesae.page.atoms import parts
from writesae.page.atoms.data import Bars, Context
from writesae.page.atoms.measure import Facts
from writesae.page.atoms.text import TokenTexts


@torch.inference_mode(False)
@torch.no_grad()
def neuronpedia_batch(facts: Facts, dataset: str = "") -> dict[str, Json]:
    """The atoms of `facts` as SAEDashboard's `NeuronpediaDashboardBatch`; only what it holds is measured.

    Logits are those of `AtomPage.effect`, or along the direct path where it was not measured. Lists about neurons of
    the residual stream are empty, and so is `vector`: an atom is a matrix in the state of a head.
    """
    info = facts.lab.describe()
    return {
        "model_id": info["model"],
        "layer": info["layer"],
        "sae_set": f"writesae-{info['target']}-{info['d_sae']}",
        "sae_id_suffix": f"h{info['head']}",
        "features": [_feature(facts, column, dataset) for column in range(len(facts.number))],
    }


def _feature(facts: Facts, column: int, dataset: str) -> dict[str, Json]:
    correlated = [f"correlated_{of}_{what}" for of in ("neurons", "features") for what in ("indices", "l1", "pearson")]
    rows = facts.rows(column).assign(cosine=np.nan)
    change, activations = facts.change(column), rows["activation"].to_numpy(float)
    ends, density = parts.vocabulary(facts, change), parts.bars(activations, low=0.0)
    logits = parts.bars(change[: facts.texts.size])
    return {
        "feature_index": int(facts.number[column]),
        **{f"neuron_alignment_{what}": [] for what in ("indices", "values", "l1")},
        **{name: [] for name in (*correlated, "decoder_weights_dist", "vector")},
        "neg_str": [token.text for token in ends.low],
        "neg_values": [token.value for token in ends.low],
        "pos_str": [token.text for token in ends.high],
        "pos_values": [token.value for token in ends.high],
        "frac_nonzero": len(rows) / facts.ids.size,
        "freq_hist_data_bar_values": _centers(density),
        "freq_hist_data_bar_heights": [round(share * len(rows)) for share in density.values],
        "logits_hist_data_bar_heights": logits.values,
        "logits_hist_data_bar_values": _centers(logits),
        "n_prompts_total": facts.ids.shape[0],
        "n_tokens_in_prompt": facts.ids.shape[1],
        "dataset": dataset,
        "activations": [
            *(_activation(context, -1, float(activations.max()), -1) for context in parts.top(facts, rows)),
            *(
                _activation(context, band.low, band.high, band.share_high - band.share_low)
                for band in parts.bands(facts, rows)
                for context in band.contexts
            ),
        ],
    }


def _activation(context: Context, low: float, high: float, share: float) -> dict[str, Json]:
    """SAEDashboard marks the strongest ones by a `bin_min` and a `bin_contains` of -1."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": context.tokens,
        "values": context.values,
        "qualifying_token_index": context.at,
    }


def _centers(bars: Bars) -> list[float]:
    return [round((a + b) / 2, 5) for a, b in itertools.pairwise(bars.edges)]


@torch.inference_mode(False)
@torch.no_grad()
def neuronpedia_graph(
    model: HookedRecurrent, text: str, saes: Sequence[SAE] = (), n_logits: int = 5
) -> dict[str, Json]:
    """The attribution graph of a text: links from every write to the logits of the likeliest next tokens.

    The weight of a link is `write_attribution` to the logit less the mean logit. In heads with a dictionary of writes,
    active atoms have nodes, and the node of a write is what the atoms leave of it: the sum is the attribution of the
    write. Tokens have no links, because every write depends on all tokens before it. `influence` is that of
    circuit-tracer: the share of all effects (absolute, times the token's probability) that the node and those with
    larger effects make up.

    Args:
        saes: dictionaries of different heads of the model. Those of states are passed over.

    Raises:
        ValueError: the tokenizer does not fit.

    Cost: a pass with gradients for each logit, and another for each dictionary.
    """
    tokens, texts, end = model.to_tokens(text, prepend_bos=False), TokenTexts(model), model.cfg.n_layers
    pieces, last = texts.many(tokens[0].tolist()), tokens.shape[1] - 1
    likeliest = model(tokens)[0, -1].softmax(-1)[: texts.size].topk(min(n_logits, texts.size))
    targets = [(f"{end}_{at}_{last}", at, p) for p, at in zip(likeliest.values.tolist(), likeliest.indices.tolist())]
    nodes = [
        *((f"E_{at}_{t}", "E", at, t, "embedding", pieces[t], None) for t, at in enumerate(tokens[0].tolist())),
        *((x, str(end), at, last, "logit", f'Output "{texts[at]}" (p={p:.3f})', None) for x, at, p in targets),
    ]
    place = ["layer", "head", "atom", "position"]
    links = (
        pd.concat([part.assign(target=x, p=p) for x, at, p in targets for part in _effects(model, tokens, saes, at)])
        .groupby([*place, "target", "p"], as_index=False)
        .sum()
        .assign(source=lambda table: table[place].astype(str).agg("_".join, axis=1))
    )
    shares = links["weight"].abs().mul(links["p"]).groupby([links[each] for each in ("source", *place)]).sum()
    largest = shares.div(shares.sum()).sort_values(ascending=False).cumsum()
    for source, layer, head, atom, t, share in largest.reset_index(name="share").itertuples(index=False):
        kind = ("write", head, "write") if atom < 0 else ("atom", atom, f"atom {atom}")
        nodes.append((source, str(layer), kind[1], t, kind[0], f"{kind[2]} of L{layer}H{head}", share))
    slug, scan = (re.sub(r"[^\w.-]+", "-", x, flags=re.ASCII) for x in (text[:40], model.cfg.model_name.split("/")[-1]))
    fields = ("node_id", "layer", "feature", "ctx_idx", "feature_type", "clerp", "influence")
    return {
        "metadata": {"slug": slug, "scan": scan, "prompt": text, "prompt_tokens": pieces, "node_threshold": 0.8},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [dict(zip(fields, node)) | {"jsNodeId": node[0]} for node in nodes],
        "links": cast("list[Json]", links[["source", "target", "weight"]].to_dict("records")),
    }


@torch.enable_grad()
def _effects(model: HookedRecurrent, tokens: Tensor, saes: Sequence[SAE], token: int) -> Iterator[pd.DataFrame]:
    """`write_attribution` to a logit less the mean, the same of active atoms, and those taken off the writes. The
    column `atom` is -1 for a write."""

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, token] - logits[0, -1].mean()

    yield write_attribution(model, tokens, metric).rename(columns={"attribution": "weight"}).assign(atom=-1)
    for sae, hook in ((sae, hook) for sae in saes if (hook := HeadHook.of(sae)).target == "write"):
        x = model.run_with_cache(tokens, names_filter=[hook.name])[1][hook.name].detach().requires_grad_()
        logits = cast(Tensor, model.run_with_hooks(tokens, fwd_hooks=[(hook.name, lambda _, hook, x=x: x)]))
        (gradient,) = torch.autograd.grad(metric(logits), x)
        atoms = sae.encode(x[0].to(next(sae.parameters()))).detach().requires_grad_()
        effects = atoms * torch.autograd.grad((sae.decode(atoms) * gradient[0]).sum(), atoms)[0]
        weights = torch.cat([-effects.sum(1, keepdim=True), effects], 1).detach().cpu()
        position, column = weights.nonzero(as_tuple=True)
        yield pd.DataFrame(
            {
                "layer": hook.layer,
                "head": hook.head,
                "position": position,
                "atom": column - 1,
                "weight": weights[position, column],
            }
        )
