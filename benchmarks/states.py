"""Codes of states: what heads of language models lose when each state is replaced by its code, and what models whose
facts are known answer after a fact of a memory was replaced or removed."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import torch
from frame import Line
from tables import table
from torch import Tensor

from hookpoints import HookedRecurrent, Memory, embedded, zoo
from hookpoints.errors import InputError
from sae_lens_writesae import label_atoms, train, training_config
from writesae_study.known.readers import OF_STATES, HeadStates, drawn

TITLE = "Codes of states"
QUICK = {"fitted": 200, "steps": 5, "fact_steps": 5, "texts": 4}
HEADS = (("embedded", 4, 2), ("embedded", 1, 0), ("embedded-rwkv7", 2, 0), ("embedded-mamba2", 2, 1))
CONTEXT = 64
"""Tokens before a state. The predictions of half as many after it are compared."""
ATOMS = 64
"""Of each side."""
PAIRS = 4
"""In the code of a state."""
FITS = OF_STATES | {"null: random pairs": drawn}
MODELS = ("recall", "recall-mamba2", "recall-rwkv7")
TOLD = (4, 8)
"""Facts of a text."""


# ------------------------------------------------------------------------------------------------ language models


def passages(model: HookedRecurrent, split: Any, n: int, length: int) -> Tensor:
    """[n,length] tokens of the held-out speeches."""
    ids = model.to_tokens(embedded.text(split), prepend_bos=False, truncate=False)[0]
    return ids[: len(ids) // length * length].view(-1, length)[:n]


@torch.no_grad()
def of_head(name: str, layer: int, head: int, fitted: int, steps: int, texts: int) -> dict[str, dict[str, float]]:
    """Of each code: bits, numbers, the share of variance that it explains, and the typical share that it recovers: the
    median over texts of 1 - KL / KL(state 0), of the next `CONTEXT` / 2 tokens."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    every = 16
    seen = passages(model, "train", every * fitted // CONTEXT, CONTEXT)
    states = list[Tensor]()
    for tokens in seen.split(64):
        states += [model.recurrence(tokens[:, :end], layer).final_state()[:, head] for end in range(every, 65, every)]
    job = HeadStates(
        model, layer, head, torch.cat(states), (ATOMS, ATOMS), steps, seed=0, terms=PAIRS, fitted_terms=PAIRS
    )
    tokens = passages(model, "test", texts, CONTEXT + CONTEXT // 2)
    memory = model.memory(tokens[:, :CONTEXT])
    native = memory.state(layer)[:, head]
    plain = log_probabilities(model, memory, tokens)

    def nats(replaced: Tensor) -> Tensor:
        """[texts] of states [texts,K,V]."""
        other = memory.state(layer).clone()
        other[:, head] = replaced
        coded = log_probabilities(model, memory.with_states({layer: other}), tokens)
        return (plain.exp() * (plain - coded)).sum((1, 2))

    deleted = nats(torch.zeros_like(native))
    found = {"deleted": {"nats": float(deleted.median())}}
    for fit, of_states in FITS.items():
        with torch.enable_grad():
            reader = of_states(job)
        coded = reader.decode(reader.code(native)).view_as(native)
        left = (coded - native).square().sum() / native.square().sum()
        share = (1 - nats(coded) / deleted).median()
        found[fit] = {
            "bits": reader.bits,
            "numbers": reader.numbers,
            "explained": 1 - float(left),
            "recovered": float(share),
        }
    return found


def log_probabilities(model: HookedRecurrent, memory: Memory, tokens: Tensor) -> Tensor:
    """[B,T,vocabulary] after the tokens that follow the memory."""
    return model.logits_after(memory, tokens[:, CONTEXT:]).log_softmax(-1)


# ------------------------------------------------------------------------------------------------ facts


def of_facts(name: str, fitted: int, steps: int, texts: int) -> dict[str, Any]:
    """Shares of texts in which the model gives an answer, for each number of facts."""
    holder = max(zoo.truth(name).holders, key=lambda holder: len(holder.heads))
    layer = holder.layer
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    tokenizer: Any = model.tokenizer
    words = [tokenizer.decode([token]).strip() for token in range(model.cfg.d_vocab)]
    seen = told(name, 4, fitted, seed=0)
    dictionaries = list[Any]()
    for head in holder.heads:
        with torch.no_grad():
            states = model.recurrence(seen, layer).final_state()[:, head]
        cfg = training_config(
            model,
            layer,
            head,
            target="state",
            architecture="writesae_product",
            d_sae=96 * 96,
            sae={"encoder": "pursuit", "n_pairs": 4},
            training_tokens=96 * steps,
            verbose=False,
        )
        dictionary: Any = train(cfg, states)
        label_atoms(dictionary, states, [[words[token] for token in text] for text in seen.tolist()])
        dictionaries.append(dictionary)
    return {
        f"{pairs} facts": rewritten(model, dictionaries, words, told(name, pairs, texts, seed=70 + pairs))
        for pairs in TOLD
    }


def told(name: str, pairs: int, n: int, seed: int) -> Tensor:
    """[n,2 pairs + 2] tokens: a start, keys and values one after the other, and a key that is asked."""
    task: Any = zoo.task(name)
    batch = task.batch(n, torch.Generator().manual_seed(seed), pairs=pairs, queries=1)
    return batch.tokens[:, : 2 * pairs + 2]


@torch.no_grad()
def rewritten(model: HookedRecurrent, dictionaries: list[Any], words: list[str], texts: Tensor) -> dict[str, float]:
    """The first fact of each text is replaced, replaced in vain (for the next key), removed, and removed before another
    is added."""
    values = sorted({int(token) for token in texts[:, 2:-1:2].flatten()})
    counts: dict[str, list[bool]] = {}

    def count(what: str, right: bool) -> None:
        counts.setdefault(what, []).append(right)

    for row, text in enumerate(texts.tolist()):
        keys = text[1:-1:2]
        held = text[2:-1:2]
        new = next(value for value in values[row % len(values) :] + values if value not in held)
        memory = model.memory(texts[row : row + 1])
        edits = {"replaced": (0, new), "null": (1, new), "removed": (0, None), "added": (0, None)}
        for edit, (number, value) in edits.items():
            key = words[keys[number]]
            word = None if value is None else words[value]
            try:
                changed = memory.with_fact(dictionaries, key, word, instead_of=words[held[number]])
                if edit == "added":  # after the old fact was removed
                    changed = changed.with_fact(dictionaries, key, words[new])
                said = answers(model, changed, keys)
            except InputError:  # a word names no atom, or the old fact is not held
                said = [-1] * len(keys)
            count(f"{edit}: an error", said[0] == -1)
            count(f"{edit}: new answer", said[0] == new)
            count(f"{edit}: old answer", said[0] == held[0])
            if edit != "null":
                for fact in range(1, len(keys)):
                    count(f"{edit}: other facts right", said[fact] == held[fact])
    return {what: statistics.mean(rights) for what, rights in counts.items()}


def answers(model: HookedRecurrent, memory: Memory, keys: list[int]) -> list[int]:
    """What the model says after each key."""
    return [int(model.logits_after(memory, torch.tensor([[key]]))[0, -1].argmax()) for key in keys]


# ------------------------------------------------------------------------------------------------ the page


def measure(fitted: int = 4000, steps: int = 400, fact_steps: int = 600, texts: int = 100) -> dict[str, Any]:
    codes = {f"{name} L{layer}H{head}": of_head(name, layer, head, fitted, steps, texts) for name, layer, head in HEADS}
    facts = {name: of_facts(name, 1000, fact_steps, texts) for name in MODELS}
    return {"heads": codes, "facts": facts}


def lines(found: dict[str, Any]) -> list[Line]:
    of_models = [(name, told, rates) for name, by_told in found["facts"].items() for told, rates in by_told.items()]
    made = list[Line]()
    for name, told, rates in of_models:
        made.append(
            Line(f"{name}, {told}: new answer after a fact is replaced", rates["replaced: new answer"], "", 0.95, True)
        )
        made.append(Line(f"{name}, {told}: other facts right", rates["replaced: other facts right"], "", 0.98, True))
        made.append(Line(f"{name}, {told}: old answer after a fact is removed", rates["removed: old answer"], "", 0.1))
    return made


def text(found: dict[str, Any]) -> str:
    """Tables of codes by head, and of answers."""
    heads = found["heads"]
    rows = []
    for fit in FITS:
        first = next(iter(heads.values()))[fit]
        shares = [f"{head[fit]['explained']:.2f}, {head[fit]['recovered']:.2f}" for head in heads.values()]
        rows.append([fit, f"{first['bits']:.0f}", f"{first['numbers']:,}", *shares])
    deleted = [f"{head['deleted']['nats']:.3g} nats" for head in heads.values()]
    rows.append(["state 0", "0", "0", *deleted])
    codes = table(("explained variance, recovered KL of", "bits", "numbers", *heads), rows)
    what = list(next(iter(next(iter(found["facts"].values())).values())))
    rows = []
    for name, by_told in found["facts"].items():
        for told, rates in by_told.items():
            rows.append([f"{name}, {told}", *(f"{rates[column]:.0%}" for column in what)])
    return "\n".join([codes, table(("texts", *what), rows), "[What a memory holds](reading.md)."])


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
