"""Models of the zoo, whose writes are known to hold facts: what methods find in these writes without labels.

A *fact* is a key with its value. The truth table of a model names the write that holds it, W = k u^T. A method is
fitted to writes alone. It gives a code of each: atoms of the key side and of the value side (the same atom for both,
where atoms are matrices), what each atom contributes to the value side, and a reconstruction. Symbols only score.

Alphabet: N writes, H heads that hold a fact together, F atoms, K key side, V value side, B facts or states, P pairs,
S symbols that values are made of (64 values, or 24 attributes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hookpoints import HookedRecurrent, write_attribution, zoo
from sae_lens_writesae import LowRank, train_many_on_writes, train_on_writes, training_config
from writesae.experiment.firings import bar
from writesae.verdict.statistics import estimate

LR = 3e-3
"""Learning rate of Adam."""
BATCH = 256
"""Rows of a step, the same for all that is trained."""
GRID = (16, 24, 32, 48, 64, 96)
"""Numbers of atoms of a side that are tried."""
TOLERANCE = 0.02
"""Of the sizes whose explained variance on held-out writes is this near to that of the best, the smallest is taken:
fewest atoms, then fewest active ones."""
RESTARTS = 8
"""Fits of an additive quantizer, of which the best is taken."""
PASSES = 25
"""Passes of each over the rows."""
MOST_SUMS = 4096
"""Sums of one code of each book that an additive quantizer may have."""
FOUND = 0.8
"""Correlation, or purity, from which on an atom stands for a symbol."""


class Side(NamedTuple):
    """A code of one side of N writes."""

    code: Tensor
    """[N,F]"""
    atoms: Tensor
    """[F,K] or [F,V]"""
    bits: float
    """Of one code: log2 of the number of choices, and 8 for each coefficient."""


class Code(NamedTuple):
    """A code of the N writes of one head."""

    key_atom: Tensor
    """[N] number of the strongest atom of the key side."""
    value_atom: Tensor
    """[N] number of the strongest atom of the value side."""
    contribution: Tensor
    """[N,F] coefficient of each value atom in u, along the native key."""
    values: Tensor
    """[F,V] value atoms."""
    written: Tensor
    """[N,K,V] reconstructions."""
    parameters: int
    """Numbers in the decoder."""
    bits: float
    """Of one code."""


class World(NamedTuple):
    """The writes of a model of the zoo that hold facts, and what they hold."""

    model: HookedRecurrent
    task: Any
    holder: zoo.Holder
    pairs: int
    keys: Tensor
    """[H,N,K]"""
    values: Tensor
    """[H,N,V]"""
    key_symbols: Tensor
    """[N]"""
    value_symbols: Tensor
    """[N]"""

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, sequences: int) -> World:
        """Writes of fresh sequences of a middling size. Last pairs are left out: their writes see the question. All
        is on the host: the models are tiny, and scikit-learn takes nothing else."""
        task, model = zoo.task(name), HookedRecurrent.from_pretrained(name, device="cpu")
        holder = max(zoo.truth(name).holders, key=lambda each: len(each.heads))  # of the key or of the value
        pairs = task.sizes[2 * len(task.sizes) // 3]["pairs"]
        batch = task.batch(sequences, torch.Generator().manual_seed(9), pairs=pairs)  # pyright: ignore[reportCallIssue]
        form, at = model.recurrence(batch.tokens, holder.layer), batch.places[holder.holds][:, :-1] + holder.offset
        chosen = [side[torch.arange(sequences)[:, None], at][:, :, list(holder.heads)] for side in (form.k, form.u)]
        symbols = (batch.symbols[kind][:, :-1].flatten() for kind in ("keys", "values"))
        return cls(model, task, holder, pairs, *(x.flatten(0, 1).transpose(0, 1) for x in chosen), *symbols)

    def parts(self, values: Tensor) -> Tensor:
        """Which of S symbols values [...] are made of [...,S], 0 or 1: itself, or an attribute of each slot."""
        if not hasattr(self.task, "attributes"):
            return one_hot(values, self.task.n_values).float()
        return one_hot(self.task.attributes(values), self.task.n_attributes).flatten(-2).float()


# ------------------------------------------------------------------------------------------------ codes of one side


def vector_topk(
    rows: Tensor, sizes: Sequence[tuple[int, int, int]], steps: int, fitted: int | None = None, lr: float = LR
) -> list[Side]:
    """TopK autoencoders of vectors [N,D], one for each (F, k, seed), trained side by side on the first `fitted` rows: a
    tied start from rows, no biases, Adam with a cosine, batches of `BATCH`."""
    most, active, scale = max(n for n, _, _ in sizes), max(k for _, k, _ in sizes), rows.norm(dim=1).mean()
    start = torch.zeros(len(sizes), most, rows.shape[1])
    for m, (n, _, seed) in enumerate(sizes):
        start[m, :n] = normalize(torch.tensor(kmeans_plusplus(rows[:fitted].numpy(), n, random_state=seed)[0]), dim=1)
    atoms, encoder = (start.clone().requires_grad_() for _ in range(2))
    n, k = (torch.tensor([size[field] for size in sizes])[:, None, None] for field in (0, 1))

    def code(x: Tensor) -> Tensor:
        top = (x @ encoder.mT).masked_fill(torch.arange(most) >= n, -1.0).topk(active, dim=-1)
        kept = top.values.clamp_min(0).masked_fill(torch.arange(active) >= k, 0)
        return torch.zeros(*kept.shape[:2], most).scatter(-1, top.indices, kept)

    optimizer, generator = torch.optim.Adam([atoms, encoder], lr=lr, fused=True), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in bar(range(steps), "vector autoencoders"):
        x = rows[torch.randint(len(rows[:fitted]), (BATCH,), generator=generator)] / scale
        optimizer.zero_grad()
        (code(x) @ atoms - x).square().sum(-1).mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = code(rows / scale) * scale
        return [Side(c[:, : size[0]], a[: size[0]], bits(*size[:2])) for c, a, size in zip(found, atoms, sizes)]


def choose_size(rows: Tensor, active: Sequence[int], steps: int, lr: float = LR) -> tuple[int, int]:
    """(F, k), without labels, by the rule of `TOLERANCE`, from vector autoencoders of all sizes."""
    sizes, fitted = [(n, k, 0) for n in GRID for k in active], len(rows) * 7 // 8
    left = [(c @ a - rows)[fitted:].square().sum() for c, a, _ in vector_topk(rows, sizes, steps, fitted, lr)]
    most = min(left) + TOLERANCE * (rows - rows.mean(0))[fitted:].square().sum()
    return next((n, k) for (n, k, _), each in zip(sizes, left) if each <= most)


def kmeans(rows: Tensor, n: int, seed: int) -> Side:
    """A quantizer of n codes."""
    fitted = KMeans(min(n, len(rows)), n_init="auto", random_state=seed).fit(rows.numpy())
    atoms = torch.tensor(fitted.cluster_centers_).to(rows)
    return Side(one_hot(torch.tensor(fitted.labels_).long(), len(atoms)).to(rows), atoms, math.log2(n))


def residual(rows: Tensor, n: int, seed: int) -> Side:
    """Two quantizers of n / 2 codes, the second one of what the first one leaves."""
    one = kmeans(rows, n // 2, seed)
    two = kmeans(rows - one.code @ one.atoms, n // 2, seed)
    return Side(torch.cat([one.code, two.code], 1), torch.cat([one.atoms, two.atoms]), one.bits + two.bits)


def nearest_codes(rows: Tensor, books: Tensor) -> Tensor:
    """[N,M] the code of each of M books [M,n,D] whose sum is nearest to each row. Tries all n^M sums."""
    numbers = torch.cartesian_prod(*[torch.arange(books.shape[1])] * len(books)).view(-1, len(books))
    sums = books[torch.arange(len(books)), numbers].sum(1)
    return numbers[(2 * rows @ sums.T - sums.square().sum(1)).argmax(1)]


def additive_books(rows: Tensor, n_books: int, n: int, seed: int) -> tuple[float, Tensor]:
    """Books [M,n,D] of an additive quantizer, and its squared error (Babenko and Lempitsky, 2014): alternating least
    squares from k-means of what the books before leave. Noise that falls to 0 is added to the rows that are coded, so
    that codes leave poor places (Martinez et al., 2018)."""
    generator = torch.Generator().manual_seed(seed)
    starts, left = [], rows
    for number in range(n_books):
        start = kmeans(left, n, 10 * seed + number)
        starts.append(start.atoms)
        left = left - start.code @ start.atoms
    books = torch.stack(starts)
    for step in range(PASSES):
        warmth = max(0.0, 1 - step / (0.7 * PASSES))
        noise = warmth * rows.std(0) * torch.randn(rows.shape, generator=generator)
        code = one_hot(nearest_codes(rows + noise, books), n).flatten(1).to(rows)
        gram = code.T @ code + 1e-3 * torch.eye(n_books * n)
        books = torch.linalg.solve(gram, code.T @ rows).view(n_books, n, -1)
    return float((rows - summed(rows, books)).square().sum()), books


def summed(rows: Tensor, books: Tensor) -> Tensor:
    """What an additive quantizer makes of rows."""
    return books[torch.arange(len(books)), nearest_codes(rows, books)].sum(1)


def additive(rows: Tensor, n: int, seed: int) -> Side:
    """An additive quantizer of at most n codes in all, the best of `RESTARTS`. The number of books is chosen without
    labels, by the rule of `TOLERANCE`."""
    fitted, sizes = len(rows) * 7 // 8, [m for m in (1, 2, 3, 4) if (n // m) ** m <= MOST_SUMS]

    def best(x: Tensor, n_books: int) -> Tensor:
        tries = (additive_books(x, n_books, n // n_books, RESTARTS * seed + start) for start in range(RESTARTS))
        return min(tries, key=lambda each: each[0])[1]

    left = {m: (summed(rows, best(rows[:fitted], m)) - rows)[fitted:].square().sum() for m in sizes}
    most = min(left.values()) + TOLERANCE * (rows - rows.mean(0))[fitted:].square().sum()
    books = best(rows, next(m for m in sizes if left[m] <= most))
    code = one_hot(nearest_codes(rows, books), books.shape[1]).flatten(1).to(rows)
    return Side(code, books.flatten(0, 1), len(books) * math.log2(books.shape[1]))


def svd(rows: Tensor, n: int, seed: int, bits_most: float = math.inf) -> Side:
    """The first right singular vectors: at most n, and coefficients of at most so many bits. Seeds do not differ."""
    atoms = torch.linalg.svd(rows, full_matrices=False)[2][: int(min(n, bits_most / 8))]
    return Side(rows @ atoms.T, atoms, 8.0 * len(atoms))


def of_labels(rows: Tensor, labels: Tensor) -> Side:
    """The vectors that explain rows best, given which ones each is the sum of [N,F]: not a method, but the truth."""
    return Side(labels, torch.linalg.lstsq(labels, rows, driver="gelsd").solution, math.log2(labels.shape[1]))


def bits(n: int, k: int) -> float:
    """Of k active ones of n atoms, with their coefficients."""
    return math.log2(math.comb(n, k)) + 8 * k


# ------------------------------------------------------------------------------------------------ codes of writes


@torch.no_grad()
def of_sides(key: Side, value: Side) -> Code:
    """A code of writes from one of their keys and one of their values."""
    k, u = (side.code @ side.atoms for side in (key, value))
    i, j = ((side.code * side.atoms.norm(dim=1)).abs().argmax(1) for side in (key, value))
    return Code(
        key_atom=i,
        value_atom=j,
        contribution=value.code,
        values=value.atoms,
        written=k[:, :, None] * u[:, None],
        parameters=key.atoms.numel() + value.atoms.numel(),
        bits=key.bits + value.bits,
    )


@torch.no_grad()
def of_atoms(sae: Any, keys: Tensor, values: Tensor, active: int) -> Code:
    """The code of a dictionary of rank-one matrices."""
    x, atoms = LowRank.rank_one(keys, values).dense().flatten(1), sae.atoms()
    (v, w), acts = (side[:, 0] for side in (atoms.keys, atoms.values)), sae.encode(x)
    strongest = (acts * atoms.norm()).argmax(1)
    return Code(
        strongest,
        strongest,
        contribution=acts * (keys @ v.T) / keys.square().sum(1, keepdim=True),
        values=w,
        written=sae.decode(acts).view(len(keys), keys.shape[1], -1),
        parameters=v.numel() + w.numel(),
        bits=bits(len(v), active),
    )


@torch.no_grad()
def of_product(sae: Any, keys: Tensor, values: Tensor) -> Code:
    """The code of a product dictionary in training, both sides in their native orientation."""
    key, value = sae.code(LowRank.rank_one(keys, values))
    sign, cfg = (key.rows * keys).sum(1, keepdim=True).sign(), sae.cfg
    most = torch.where(sign.mean() < 0, -1.0, 1.0)  # atoms that stand for -k and -u are turned, not their codes
    of_key = Side(sign * most * key.acts, most * sae.key_atoms.detach(), bits(cfg.f_key, cfg.k_key))
    of_value = Side(sign * most * value.acts, most * sae.value_atoms.detach(), bits(cfg.f_value, cfg.k_value))
    return of_sides(of_key, of_value)


def fits(
    world: World, head: int, seeds: int, steps: int, brief: bool = False, only: str | None = None
) -> dict[str, list[Code]]:
    """Each method's codes of the writes of a head, one for each seed; "truth" and the nulls behind them. `brief`:
    product dictionaries and quantizers alone, at a rate that is enough for a third of the steps, and the nulls. `only`:
    one method of those that need no gradients."""
    keys, values, every = world.keys[head].contiguous(), world.values[head].contiguous(), range(seeds)
    lr = 1e-2 if brief else LR
    (n_key, _), (n_value, k) = (
        choose_size(keys, (1,), steps // 2, lr),
        choose_size(values, (1, 2, 3, 4), steps // 2, lr),
    )
    n_atoms = (n_key * keys.shape[1] + n_value * values.shape[1]) // (keys.shape[1] + values.shape[1])

    def config(architecture: str, n: int, seed: int, n_steps: int = steps, **sae: int | str) -> Any:
        return training_config(
            world.model,
            world.holder.layer,
            world.holder.heads[head],
            architecture=architecture,
            d_sae=n,
            sae=sae,
            seed=seed,
            context_size=8,
            train_batch_size_tokens=BATCH,
            training_tokens=BATCH * n_steps,
            lr=lr,
            verbose=False,
        )

    def product(n_steps: int, start: str) -> list[Code]:
        configs = (
            config(
                "writesae_product",
                n_key * n_value,
                seed,
                n_steps,
                f_key=n_key,
                f_value=n_value,
                k_value=k,
                decoder_init=start,
            )
            for seed in every
        )
        return [of_product(train_on_writes(each, keys, values), keys, values) for each in configs]

    quantizers: dict[str, Callable[[Tensor, int, int], Side]] = {
        "product quantizer (k-means of k and of u)": kmeans,
        "additive quantizers of k and of u": additive,
        "residual quantizers of k and of u": residual,
        "SVD of keys and of values, equal bits": partial(svd, bits_most=bits(n_value, k)),
    }
    if only is not None:
        fit = quantizers[only]
        return {only: [of_sides(fit(keys, n_key, seed), fit(values, n_value, seed)) for seed in every]}
    found = {}
    if not brief:
        found["vector TopK autoencoders of k and of u"] = [
            of_sides(*sides)
            for sides in zip(
                vector_topk(keys, [(n_key, 1, seed) for seed in every], steps),
                vector_topk(values, [(n_value, k, seed) for seed in every], steps),
            )
        ]
    for name, fit in [*quantizers.items()][: 1 if brief else None]:
        found[name] = [of_sides(fit(keys, n_key, seed), fit(values, n_value, seed)) for seed in every]
    found["writesae_product"] = product(steps, "native")
    found["null: untrained writesae_product"] = product(1, "random")
    codes = {
        "writesae_topk, equal parameters": (n_atoms, {"k 1": 1, "k 4": 4, "k 32": 32}),
        "writesae_topk, 16 times the atoms": (16 * n_atoms, {"k 1": 1, "k of the value side": k}),
    }
    for name, (n, active) in () if brief else codes.items():
        sizes = [(told, min(a, n), s) for told, a in active.items() for s in every]
        saes = train_many_on_writes(
            [config("writesae_topk", n, s, k=a) for _, a, s in sizes],
            [LowRank.rank_one(keys, values)] * len(sizes),
        )
        for (told, a, _), sae in zip(sizes, saes):
            found.setdefault(f"{name}, {told}", []).append(of_atoms(sae, keys, values, a))
    labels, parts = one_hot(world.key_symbols).float(), world.parts(world.value_symbols)
    mixed = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    truth = of_sides(of_labels(keys, labels), of_labels(values, parts))
    if not brief:
        found["truth: vectors fitted to the symbols"] = [truth]
        found["null: vectors fitted to permuted symbols"] = [
            of_sides(of_labels(keys, labels[mixed]), of_labels(values, parts[mixed]))
        ]
    another = (x[mixed] if isinstance(x, Tensor) and len(x) == len(mixed) else x for x in truth)
    return found | {"null: another pair's write": [Code._make(another)]}


# ------------------------------------------------------------------------------------------------ scores


def purity(atoms: Tensor, parts: Tensor) -> tuple[float, float]:
    """Of atoms that are the strongest one of three rows or more: the mean share of rows [N] with the most frequent
    symbol of the atom; and the share of symbols [N,S] that are this of an atom with a purity above `FOUND`."""
    counts = one_hot(atoms).float().T @ torch.cat([parts, torch.ones(len(parts), 1)], 1)
    counts = counts[counts[:, -1] >= 3]
    pure, symbol = (counts[:, :-1] / counts[:, -1:]).max(1)
    return float(pure.mean()), len(symbol[pure > FOUND].unique()) / int(parts.any(0).sum())


def features(code: Code, world: World) -> tuple[float, Tensor]:
    """For each key and each part of a value, the atom whose contribution follows that part best among the writes of the
    key: the share with a correlation above `FOUND`, and atoms times their mean contributions there [keys,S,V]."""
    parts, found, vectors = world.parts(world.value_symbols), [], []
    for key in range(int(world.key_symbols.max()) + 1):
        d, c = (x[world.key_symbols == key] for x in (parts, code.contribution))
        centred = [normalize(x - x.mean(0), dim=0) for x in (d, c)]
        fit, best = (centred[0].T @ centred[1]).max(1)
        found.append(fit > FOUND)
        vectors.append(((d * c[:, best]).sum(0) / d.sum(0).clamp_min(1))[:, None] * code.values[best])
    return float(torch.stack(found).float().mean()), torch.stack(vectors)


class Facts(NamedTuple):
    """B sequences, in each of which one fact is to be another one."""

    base: zoo.Batch
    asked: Tensor
    """[B] the pair."""
    at: Tensor
    """[B] the token at which it is written."""
    new: Tensor
    """[B] its new value."""
    questions: dict[str, zoo.Batch]
    """What is asked, and what is right afterwards: "changed" for the fact, "kept" for another one, and where values
    have attributes "other attributes" of the same."""

    @classmethod
    def draw(cls, world: World, n: int) -> Facts:
        """One attribute is another one, or the whole value."""
        task, generator = world.task, torch.Generator().manual_seed(5)
        symbols = dict(task.batch(n, generator, pairs=world.pairs).symbols)
        symbols["asked"] %= world.pairs - 1
        old, other = symbols["values"].gather(1, symbols["asked"]), (symbols["asked"] + 1) % (world.pairs - 1)
        new, questions = task.others(old, generator), {"kept": task.spell(symbols | {"asked": other})}
        if "slots" in symbols:
            unit = task.n_attributes ** (2 - symbols["slots"])
            new = old + unit * (new // unit % task.n_attributes - old // unit % task.n_attributes)
            questions["other attributes"] = task.spell(symbols | {"slots": (symbols["slots"] + 1) % 3})
        base = task.spell(symbols)
        at = base.places[world.holder.holds].gather(1, symbols["asked"])[:, 0] + world.holder.offset
        changed = task.spell(symbols | {"values": symbols["values"].scatter(1, symbols["asked"], new)})
        return cls(base, symbols["asked"][:, 0], at, new[:, 0], {"changed": changed} | questions)

    @torch.no_grad()
    def ask(self, world: World, writes: Tensor | None) -> dict[str, Tensor]:
        """Whether the model answers right [B], by question, with writes [B,H,K,V] instead of the asked pair's."""
        rows, end, holder = torch.arange(len(self.new)), int(self.base.places["values"].max()) + 1, world.holder

        def replace(native: Tensor, hook: object, writes: Any = writes) -> Tensor:
            native = native.clone()
            native[rows[:, None], self.at[:, None], list(holder.heads)] = writes
            return native

        hooks: list[Any] = [] if writes is None else [(f"blocks.{holder.layer}.mixer.hook_write", replace)]
        right = {}
        for name, asked in self.questions.items():
            text = torch.cat([self.base.tokens[:, :end], asked.tokens[:, end:]], 1)
            logits = world.model.run_with_hooks(text, fwd_hooks=hooks)
            right[name] = logits[rows, asked.positions[:, 0]].argmax(-1) == asked.answers[:, 0]
        return right

    def writes(self, world: World, codes: Sequence[Code], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What each head [B,H,K,V] writes for the new fact, and where that is known [B].

        Whole values: the code of another write of the same fact. Attributes: the native write, with the atom of the
        old attribute exchanged for that of the new one, along the native key.
        """
        key = self.base.symbols["keys"].gather(1, self.asked[:, None])[:, 0]
        if "slots" not in self.base.symbols:
            of = {fact: n for n, fact in enumerate(zip(world.key_symbols.tolist(), world.value_symbols.tolist()))}
            donors = torch.tensor([of.get(fact, -1) for fact in zip(key.tolist(), self.new.tolist())])
            return torch.stack([code.written[donors] for code in codes], 1), donors >= 0
        form, rows = world.model.recurrence(self.base.tokens, world.holder.layer), torch.arange(len(key))
        k, u = (side[rows, self.at][:, list(world.holder.heads)] for side in (form.k, form.u))
        change = world.parts(self.new) - world.parts(self.base.symbols["values"][rows, self.asked])
        delta = torch.stack([torch.einsum("bs,bsv->bv", change, each[key]) for each in vectors], 1)
        return k[..., None] * (u + delta)[:, :, None], torch.ones(len(key), dtype=torch.bool)


def attributed(world: World, n: int = 16) -> dict[str, float]:
    """Share of the held writes (layer, head, token) that are among the H with the largest `write_attribution` to the
    answer's logit: precision and recall at once. "null": of H writes drawn at random."""
    facts, holder, hits, null = Facts.draw(world, n), world.holder, 0.0, 0.0
    asked, H = facts.questions["changed"], len(holder.heads)
    for b in range(n):
        text = asked.tokens[b : b + 1, : int(asked.positions[b, 0]) + 1]
        token = int(asked.answers[b, 0])
        table = write_attribution(world.model, text, lambda x, token=token: x[0, -1, token] - x[0, -1].mean())
        top = table.loc[table.attribution.abs().nlargest(H).index]
        held = (top.layer == holder.layer) & top["head"].isin(holder.heads) & (top.position == int(facts.at[b]))
        hits += held.mean() / n
        null += H / len(table) / n
    return {"writes found": float(hits), "null": null}


def pursued(
    states: Tensor, keys: Tensor, labels: Tensor, values: Tensor, pairs: int, *, refit: bool = True
) -> list[Tensor]:
    """The pairs of a key atom and a value atom, [B,P] each, that states [B,K,V] are sums of: orthogonal matching
    pursuit (Pati et al. 1993) on p_i v_j^T, which takes the pair with the largest product with what is left and fits
    all coefficients again. Of atoms with one label [F] one is taken. Without `refit`, the P largest p_i^T S v_j."""
    keys, values = normalize(keys, dim=1), normalize(values, dim=1)
    left, free, chosen = (
        states,
        torch.ones(len(states), len(keys), dtype=torch.bool),
        [states.new_zeros(len(states), 0).long()] * 2,
    )
    for n in range(1, pairs + 1):
        score = torch.einsum("ik,bkv,jv->bij", keys, left, values).masked_fill(~free[..., None], -torch.inf)
        best = score.flatten(1).argmax(1, keepdim=True)
        chosen = [torch.cat(both, 1) for both in zip(chosen, (best // len(values), best % len(values)))]
        free &= labels[chosen[0][:, -1:]] != labels
        if refit:
            p, v = keys[chosen[0]], values[chosen[1]]
            inner = (p @ p.mT) * (v @ v.mT) + 1e-4 * torch.eye(n)
            size = torch.linalg.solve(inner, torch.einsum("bnk,bkv,bnv->bn", p, states, v))
            left = states - torch.einsum("bn,bnk,bnv->bkv", size, p, v)
    return chosen


@torch.no_grad()
def read_states(world: World, n: int, sizes: Sequence[int] = (4, 8, 12, 16)) -> list[dict[str, float]]:
    """Share of the facts that a state holds which are read from it, by number of pairs: with four times as many key
    codes as symbols and without, by a linear probe that was given labels, and the model's own answers."""
    (head, *_), S, rows = world.holder.heads, world.task.n_values, []
    value = kmeans(world.values[0], S, 0)
    of_value = one_hot(value.code.argmax(1)).T @ one_hot(world.value_symbols)

    def held(pairs: int, count: int, seed: int) -> tuple[zoo.Batch, Tensor, Tensor]:
        batch = world.task.batch(count, torch.Generator().manual_seed(seed), pairs=pairs, queries=pairs)
        form = world.model.recurrence(batch.tokens[:, : 2 * pairs + 2], world.holder.layer)
        return batch, form.final_state()[:, head], batch.symbols["keys"] * S + batch.symbols["values"]

    codes = [kmeans(world.keys[0], size, 0) for size in (world.task.n_keys, 4 * world.task.n_keys)]
    labels = [(one_hot(key.code.argmax(1)).T @ one_hot(world.key_symbols)).argmax(1) for key in codes]
    methods = (("strongest reads", 0, False), ("pursuit", 0, True), ("pursuit, four times the key codes", 1, True))
    for pairs in sizes:
        batch, states, facts = held(pairs, n, pairs)
        row = {"pairs": float(pairs)}
        for name, which, refit in methods:
            k, v = pursued(states, codes[which].atoms, labels[which], value.atoms, pairs, refit=refit)
            row[name] = share_held(labels[which][k] * S + of_value.argmax(1)[v], facts)
        _, seen, targets = held(pairs, 8 * n, 99)
        wanted = torch.zeros(len(seen), world.task.n_keys * S).scatter(1, targets, 1.0)
        x = seen.flatten(1)
        gram = x.T @ x
        probe = torch.linalg.solve(gram + gram.diagonal().mean() * torch.eye(len(gram)), x.T @ wanted)
        best = (states.flatten(1) @ probe).view(n, -1, S).max(2)
        top = best.values.topk(pairs).indices
        row["linear probe, with labels"] = share_held(top * S + best.indices.gather(1, top), facts)
        answers = world.model(batch.tokens).argmax(-1).gather(1, batch.positions)
        rows.append(row | {"the model's own answers": float((answers == batch.answers).float().mean())})
    return rows


def share_held(found: Tensor, facts: Tensor) -> float:
    """Share of facts [B,P] that are among those found [B,P]."""
    return float((found[:, :, None] == facts[:, None]).any(1).float().mean())


def board(
    name: str, seeds: int, sequences: int, facts: int, steps: int, brief: bool = False, only: str | None = None
) -> dict[str, Any]:
    """The rows of one model: for each method what it finds, and how often its atoms write a fact. `brief`: without
    attribution and states, and with the methods of `fits`; "example" is the first fact in words. `only`: the rows of
    one method, as in `fits`."""
    world = World.of(name, sequences)
    drawn = Facts.draw(world, facts)
    heads = [fits(world, head, seeds, steps, brief, only) for head in range(len(world.keys))]
    rows = [
        scored(method, [list(codes) for codes in zip(*(head[method] for head in heads))], world, drawn)
        for method in heads[0]
    ]
    asked, changed = drawn.base, drawn.questions["changed"]
    ids = [*asked.tokens[0, 1 : int(asked.positions[0, 0]) + 1].tolist(), *asked.answers[0], *changed.answers[0]]
    found = {
        "model": name,
        "rows": rows,
        "plain": {name: float(hits.float().mean()) for name, hits in drawn.ask(world, None).items()},
        "example": [world.task.vocabulary[i] for i in ids],
    }
    if not brief and only is None:
        found["attribution"] = attributed(world)
        found["states"] = [] if "slots" in asked.symbols else read_states(world, facts)
    return found


def scored(method: str, codes: Sequence[Sequence[Code]], world: World, facts: Facts) -> dict[str, Any]:
    """One row: means over heads, and rates with intervals over facts and seeds; codes [seeds][heads]."""
    parts, hits = world.parts(world.value_symbols), dict[str, list[Tensor]]()
    of_key = [purity(c.key_atom, one_hot(world.key_symbols).float()) for each in codes for c in each]
    of_value = [purity(c.value_atom, parts) for each in codes for c in each]
    followed = [[features(c, world) for c in each] for each in codes] if (parts.sum(1) > 1).any() else []
    for seed, each in enumerate(codes):
        writes, known = facts.writes(world, each, [vector for _, vector in followed[seed]] if followed else [])
        for name, right in facts.ask(world, writes).items():
            hits.setdefault(name, []).append(torch.stack([right[known].float(), known.nonzero()[:, 0].float()]))
    means = {
        "keys found": [x for _, x in of_key],
        "values found": [share for each in followed for share, _ in each] or [share for _, share in of_value],
        "key purity": [x for x, _ in of_key],
        "value purity": [x for x, _ in of_value],
    }
    row: dict[str, Any] = {
        "method": method,
        "parameters": codes[0][0].parameters,
        "bits": codes[0][0].bits,
        **{name: sum(each) / len(each) for name, each in means.items()},
    }
    for name, each in hits.items():
        right, fact = torch.cat(each, 1)
        ends = zip(("mean", "low", "high"), estimate(right, fact, [n for n, x in enumerate(each) for _ in x[0]]))
        row[name] = {end: None if math.isnan(x) else x for end, x in ends}
    return row
