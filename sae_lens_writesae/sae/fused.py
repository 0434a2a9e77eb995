"""One training step on factors: atoms are selected, errors taken and gradients put into the parameters at once.

A write is sum_s k_s u_s^T, and its inner product with an atom sum_r v_r w_r^T is sum_rs (v_r.k_s)(w_r.u_s): neither
writes nor atoms are built. M dictionaries of one shape lie side by side, [M,F,R,K] and so on, and each operator is
called once for all of them; a step of one small dictionary is mostly what it costs to call its operators. Loss and
gradients of a block of rows are computed together, from the selected pairs of row and atom, so that nothing of size N*F
outlives its block. `fast` has the loop around the step.

Shapes in one step: 16 heads of 64 x 32, F 256, R 1, N 128 rows, S 1, k 4: keys [16,128,1,64], scores [16,128,256],
selected atoms [2048,4], their factors [2048,4,1,64] and [2048,4,1,32].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, pad

from sae_lens_writesae.atom.low_rank import inner_products
from sae_lens_writesae.sae.matrix import khatri_rao

if TYPE_CHECKING:
    from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config

FACTORS = ("v", "w", "v_enc", "w_enc")
BLOCK = 2**19
"""Numbers of one block: of scores, or of a gathered factor. On a CPU a block stays in the cache."""
DEVICE_BLOCK = 2**27
"""The same on a device, where each block costs some twenty launches, and memory bounds it (half a GB)."""


class Step(NamedTuple):
    """What a step did, for M dictionaries and N rows each."""

    errors: Tensor
    """[M,N] |X - B - sum_f c_f A_f|^2"""
    atoms: Tensor
    """[M,N,k] numbers of the selected atoms, among those of all dictionaries."""
    code: Tensor
    """[M,N,k] their coefficients, 0 where an atom is not active."""
    aux: Tensor | None = None
    """[M] the auxiliary loss before its weight, where there are dead atoms."""


class Dead(NamedTuple):
    """Atoms that have been silent for too long."""

    atoms: Tensor
    """[M,F]"""
    most: int
    """At least as many as a dictionary has, known without waiting for the device."""


class Biases(NamedTuple):
    """What b_dec adds to inner products with atoms and encoder, for F atoms of M dictionaries."""

    products: dict[str, Tensor]
    """By `FACTORS`: the other side of an atom times the matrix of the bias, [M,F,R,K] or [M,F,R,V]."""
    of_atoms: Tensor
    """[M,F] <A_f, B>"""
    shift: Tensor
    """[M,F] b_enc - <encoder atom, B>, or b_enc alone."""
    gain: Tensor
    """[M,F] norms of atoms, if they scale scores; else 1."""


class Chosen(NamedTuple):
    """The k atoms on top for each of M N rows; of a batch, k of the row that has most."""

    atoms: Tensor
    """[M N,k] numbers among those of all dictionaries."""
    code: Tensor
    """[M N,k] coefficients, 0 where an atom is not active."""
    of_keys: Tensor
    """[M N,S,k,R] inner products of the row's keys with those of the encoder."""
    of_values: Tensor
    """[M N,S,k,R] the same of the values."""
    of_bias: Tensor
    """[M N,k] <A_f, B>"""


class Sums(NamedTuple):
    """Sums over rows of a part of the batch, without what the bias adds: what the gradients of the mean error are made
    of."""

    by_code: Tensor
    """[M,F,1,1], of the gradients by codes."""
    codes: Tensor
    """[M,F,1,1], of codes, times the weight of a row."""
    sides: dict[str, Tensor]
    """By `FACTORS`: the gradients of both sides of atoms and encoder, [M F R,K] or [M F R,V]."""

    def plus(self, part: Sums) -> Sums:
        """The sums over both parts."""
        sides = {name: side + part.sides[name] for name, side in self.sides.items()}
        return Sums(self.by_code + part.by_code, self.codes + part.codes, sides)


class Decoded(NamedTuple):
    """The errors of the rows, without what the bias adds to them, and their gradients."""

    errors: Tensor
    """[M N]"""
    by_code: Tensor
    """[M N,k] of the mean error; 0 where an atom is not active."""
    by_atom: Tensor
    """[M F R,K+V] of the mean error, without what the bias adds."""


def step_on_writes(
    p: dict[str, Tensor],
    keys: Tensor,
    values: Tensor,
    ks: Sequence[float],
    cfg: Config,
    dead: Dead | None = None,
) -> Step:
    """One step on rows [M,N,S,K] and [M,N,S,V]; puts the gradients of each dictionary's mean error and weighted
    auxiliary loss (`with_aux`, of the `dead` atoms) into the parameters.

    With c = (<X - B, encoder atom> + b_enc)_+ of the k atoms on top of the row, or for BatchTopK of the k N on top of
    the batch (after a factor of their norms, if `rescale_acts_by_decoder_norm`; X instead of X - B unless
    `apply_b_dec_to_input`), and E = B + sum_f c_f A_f - X,
    the gradients of |E|^2 by c, and by the sides of an atom v w^T, are 2 v^T E w, 2 c E w and 2 c E^T v. E is a sum of
    outer products of the terms of atoms and of rows (and B, which stays apart): M F R + M N S terms.
    """
    M, N = keys.shape[:2]
    p = with_encoder(p)
    with torch.no_grad():
        biases = _bias_products(p, cfg)
        if cfg.architecture() == "writesae_batchtopk":
            chosen = _chosen_of_batch(p, keys, values, biases, ks)
            parts = _parts_alike(chosen)
        else:
            chosen = _chosen_atoms(p, keys, values, biases, list(map(int, ks)))
            parts = [(slice(None), chosen)]
        errors = keys.new_empty(M * N)
        sums_of_parts = list[Sums]()
        for rows, part in parts:
            part_keys, part_values = (side.flatten(0, 1)[None, rows] for side in (keys, values))
            errors[rows], sums = _decoded_sums(p, part_keys, part_values, part, 2 / N)
            sums_of_parts.append(sums)
        sums = reduce(Sums.plus, sums_of_parts)
        gradients = _with_bias(sums, biases)
        # A tied encoder is the atom with its value side scaled: its gradients are gradients of the atom.
        if cfg.encoder == "tied":
            gradients["v"] += gradients.pop("v_enc")
            gradients["w"] += gradients.pop("w_enc") * p["encoder_scale"][..., None, None]
        for name, gradient in gradients.items():
            p[name].grad = gradient
        p["b_enc"].grad = sums.by_code.flatten(1)
        # The bias meets the encoder only where it is taken from the input.
        by_shift = sums.by_code if cfg.apply_b_dec_to_input else torch.zeros_like(sums.by_code)
        p["b_dec"].grad = _bias_gradient(p, keys, values, by_shift, sums.codes)
        with_bias = torch.add(errors, (chosen.code * chosen.of_bias).sum(1), alpha=2)
        step = Step(
            with_bias.view(M, N) + _bias_errors(p, keys, values),
            chosen.atoms.view(M, N, -1),
            chosen.code.view(M, N, -1),
        )
    return _with_aux(p, keys, values, step, cfg, dead)


def with_encoder(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by `FACTORS`, also where the encoder is tied to the atoms, times the buffer `encoder_scale`."""
    if "v_enc" in p:
        return p
    return p | {"v_enc": p["v"], "w_enc": p["w"] * p["encoder_scale"][..., None, None]}


# ------------------------------------------------------------------------------------------------ selection


def _bias_products(p: dict[str, Tensor], cfg: Config) -> Biases:
    v, w, v_enc, w_enc = (p[name] for name in FACTORS)
    bias = p["b_dec"].view(len(v), v.shape[3], w.shape[3])
    taken = bias if cfg.apply_b_dec_to_input else torch.zeros_like(bias)
    products = {
        "v": _side_products(w, bias.mT),
        "w": _side_products(v, bias),
        "v_enc": _side_products(w_enc, taken.mT),
        "w_enc": _side_products(v_enc, taken),
    }
    shift = p["b_enc"] - (v_enc * products["v_enc"]).sum((2, 3))
    gain = atom_norms(v, w) if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
    return Biases(products, of_atoms=(v * products["v"]).sum((2, 3)), shift=shift, gain=gain)


def _chosen_atoms(p: dict[str, Tensor], keys: Tensor, values: Tensor, biases: Biases, ks: Sequence[int]) -> Chosen:
    M, N = keys.shape[:2]
    F = p["v"].shape[1]
    top, of_keys, of_values = _top_products(p, keys, values, biases, ks)
    first, asked = _of_dictionaries(M, N, F, tuple(ks), keys.device)
    atoms = top if M == 1 else top + first
    table = torch.stack([biases.shift, biases.gain, biases.of_atoms], -1).flatten(0, 1)
    shift, gain, of_bias = embedding(atoms, table).unbind(-1)
    of_values /= gain[:, None, :, None]  # the gain is for the choice alone
    code = (of_keys * of_values).sum((1, 3)) + shift
    if min(ks) < max(ks):
        code = code * asked
    return Chosen(atoms, code.relu(), of_keys, of_values, of_bias)


def _chosen_of_batch(p: dict[str, Tensor], keys: Tensor, values: Tensor, biases: Biases, ks: Sequence[float]) -> Chosen:
    """The k N active atoms on top of the batch of each dictionary, as SAELens' BatchTopK, the strongest of a row first.

    They are taken from the atoms on top of each row. A row all of whose atoms are among them may have more: of such
    rows twice as many are looked at, until none is left. A device is waited for twice, and once for each look.
    """
    M, N = keys.shape[:2]
    F = p["v"].shape[1]
    width = min(F, 4 * math.ceil(max(ks)))
    chosen = _chosen_atoms(p, keys, values, biases, [width] * M)
    while True:
        kept = _kept_scores(chosen, biases, [int(k * N) for k in ks])
        rows = (kept > 0).all(1).view(M, N).any(0).nonzero().flatten()
        if width == F or not len(rows):
            break
        added = min(width, F - width)
        width += added
        wide = _chosen_atoms(p, keys[:, rows], values[:, rows], biases, [width] * M)
        numbers = _numbers_in(M, N, device=rows.device)[:, rows].flatten()
        padded = (pad(x, (*[0] * (x.ndim - 1), added)) for x in chosen)
        chosen = Chosen(*(x.index_copy_(0, numbers, new) for x, new in zip(padded, wide)))
    places = _top_of_rows(kept).indices
    chosen = chosen._replace(code=chosen.code * (kept > 0))
    indices = [places if x.ndim == 2 else places[:, None, :, None] for x in chosen]
    return Chosen(*(x.take_along_dim(index, x.ndim // 2) for x, index in zip(chosen, indices)))


def _kept_scores(chosen: Chosen, biases: Biases, counts: Sequence[int]) -> Tensor:
    """[M N,k] scores of so many atoms of each dictionary as are on top, else 0."""
    scores = chosen.code * embedding(chosen.atoms, biases.gain.view(-1, 1)).squeeze(2)
    return torch.cat([_top_of_batch(part, count) for part, count in zip(scores.chunk(len(counts)), counts)])


def _top_of_batch(scores: Tensor, count: int) -> Tensor:
    """[N,k] scores where they are among so many on top, and above 0; else 0. Of those that tie, exactly so many."""
    top, index = scores.relu().flatten().topk(count, sorted=False)
    return torch.zeros_like(scores).flatten().scatter_(0, index, top).view_as(scores)


def _top_of_rows(kept: Tensor) -> torch.return_types.topk:
    """The scores above 0 of each row, in order, and as many places for all rows as one has at most. Waits for a
    device."""
    return kept.topk(max(1, int((kept > 0).sum(1).max())))


def _parts_alike(chosen: Chosen) -> Iterator[tuple[Tensor, Chosen]]:
    """Rows by how many atoms they have: numbers of a part, and what is chosen for them, as wide as they need."""
    counts, order = (chosen.code > 0).sum(1).sort(descending=True)
    sixteenths = (0, 1, 4, 8, 16) if order.device.type == "cpu" else (0, 2, 16)  # a part has some fifty launches
    edges = sorted({len(order) * part // 16 for part in sixteenths})
    for start, stop, width in zip(edges, edges[1:], counts[edges[:-1]].tolist()):  # one wait
        rows = order[start:stop]
        yield rows, Chosen(*(x.narrow(x.ndim // 2, 0, max(1, width))[rows] for x in chosen))


@lru_cache(maxsize=16)
def _of_dictionaries(M: int, N: int, F: int, ks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the dictionary of each of M N rows the number of its first atom [M N,1], and whether a place is among its k
    [M N,k]: dictionaries of one stack may have another. Made once: on a device a list is a copy that waits."""
    dictionary = torch.arange(M).repeat_interleave(N)[:, None]
    asked = torch.arange(max(ks)) < torch.tensor(ks)[dictionary]
    return (F * dictionary).to(device), asked.to(device)


def _top_products(
    p: dict[str, Tensor], keys: Tensor, values: Tensor, biases: Biases, ks: Sequence[int]
) -> list[Tensor]:
    """The max(ks) atoms on top for each row [M*N,k], and inner products of the row's keys, and of its values times the
    gain, with those of the encoder [M*N,S,k,R]."""
    M, N, S, _ = keys.shape
    F, R = p["v_enc"].shape[1:3]
    k = max(ks)
    scaled = p["w_enc"] * biases.gain[..., None, None]
    offset = (biases.shift * biases.gain)[:, None]
    blocks = list(_row_blocks(N, M * F * R * S, keys.device))
    room = keys.new_empty(3, M, blocks[0].stop, S * F * R)  # allocating it for each block would take half the time
    parts = list[tuple[Tensor, Tensor, Tensor]]()
    for rows in blocks:
        n = rows.stop - rows.start
        of_keys = _products_into(room[0, :, :n], keys[:, rows], p["v_enc"])
        of_values = _products_into(room[1, :, :n], values[:, rows], scaled)
        scores = offset
        sums = room[2, :, :n, :F]
        for s, r in product(range(S), range(R)):
            scores = torch.addcmul(scores, of_keys[:, :, s, :, r], of_values[:, :, s, :, r], out=sums)
        top = top_atoms(scores, k, ordered=min(ks) < k)
        index = top[:, :, None, :, None].expand(-1, -1, S, -1, R)
        parts.append((top, of_keys.gather(3, index), of_values.gather(3, index)))
    return [_joined_blocks(blocks_of_one, 1).flatten(0, 1) for blocks_of_one in zip(*parts)]


def _products_into(room: Tensor, side: Tensor, encoder: Tensor) -> Tensor:
    """[M,n,S,F,R] inner products of the rows' side [M,n,S,D] with the encoder's [M,F,R,D], in `room` [M,n,S F R]."""
    M, n, S, _ = side.shape
    F, R = encoder.shape[1:3]
    torch.bmm(side.flatten(1, 2), encoder.flatten(1, 2).mT, out=room.view(M, n * S, F * R))
    return room.view(M, n, S, F, R)


def top_atoms(scores: Tensor, k: int, *, ordered: bool = False) -> Tensor:
    """[...,k] numbers of the k largest of [...,F], exact: they lie in the k groups whose maxima are the largest."""
    F = scores.shape[-1]
    size = 4
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    if F % size or 4 * size * k > F or scores.device.type != "cpu":  # a device selects without sorting
        return scores.topk(k, sorted=ordered).indices
    groups = top_atoms(scores.unflatten(-1, (size, F // size)).amax(-2), k)  # atom f is in group f % (F / size)
    members = (groups[..., None, :] + F // size * torch.arange(size, device=groups.device)[:, None]).flatten(-2)
    return members.gather(-1, scores.gather(-1, members).topk(k, sorted=ordered).indices)


# ------------------------------------------------------------------------------------------------ errors, gradients


def _decoded_sums(
    p: dict[str, Tensor], keys: Tensor, values: Tensor, chosen: Chosen, weight: float
) -> tuple[Tensor, Sums]:
    """Errors [n] of rows [1,n,S,K] and [1,n,S,V], and sums over them. A row is `weight` / 2 of the mean error."""
    by_error = chosen.code * weight
    decoded = _decoded_rows(p, keys, values, chosen, by_error, weight)
    of_atoms = decoded.by_atom.split([keys.shape[3], values.shape[3]], 1)
    of_encoder = _encoder_gradients(p, keys, values, chosen, decoded.by_code)
    by_code, codes = (_by_atom(chosen.atoms, x, p) for x in (decoded.by_code, by_error))
    return decoded.errors, Sums(by_code, codes, dict(zip(FACTORS, (*of_atoms, *of_encoder))))


def _with_bias(sums: Sums, biases: Biases) -> dict[str, Tensor]:
    """Gradients by `FACTORS`, [M,F,R,K] or [M,F,R,V], of the sums over all rows.

    An atom meets the bias in the error, with its coefficient; its encoder meets it in the shift, which has it
    subtracted.
    """
    weights = {"v": (sums.codes, 1), "w": (sums.codes, 1), "v_enc": (sums.by_code, -1), "w_enc": (sums.by_code, -1)}
    gradients = dict[str, Tensor]()
    for name, (weight, sign) in weights.items():
        of_bias = biases.products[name]
        gradients[name] = torch.addcmul(sums.sides[name].view(of_bias.shape), of_bias, weight, value=sign)
    return gradients


def _decoded_rows(
    p: dict[str, Tensor], keys: Tensor, values: Tensor, chosen: Chosen, by_error: Tensor, weight: float
) -> Decoded:
    """Errors and gradients, some rows at a time: a row is a sum of k R terms of atoms less its own S. `by_error` are
    the coefficients in the gradient of the mean error."""
    N, S = keys.shape[1:3]
    M, F, R, K = p["v"].shape
    V = values.shape[3]
    k = chosen.atoms.shape[1]
    # Sides of atoms and of rows lie in one table, so that one lookup gathers all terms of a row's error.
    lefts = torch.cat([p["v"].flatten(0, 2), keys.flatten(0, 2)])  # [M F R + N S,K]
    rights = torch.cat([p["w"].flatten(0, 2), values.flatten(0, 2)])
    of_atoms = _term_numbers(chosen.atoms, R)
    of_rows = _numbers_in(N, S, first=M * F * R, device=keys.device)
    index = torch.cat([of_atoms, of_rows], 1)  # [N,k R + S]
    sizes = pad(_of_terms(chosen.code, R), (0, S), value=-1.0)
    by_atom = keys.new_zeros(M * F * R, K + V)
    by_term = list[Tensor]()
    errors = list[Tensor]()
    for rows in _row_blocks(N, (k * R + S) * max(K, V), keys.device):
        size = sizes[rows]
        terms = index[rows]
        left = embedding(terms, lefts)
        right = embedding(terms, rights)
        by_left, by_right = _products_of_three(left, right, size)
        inner = (by_left * left).sum(-1)  # v^T E w of each term: what the gradient of its coefficient is made of
        by_term.append(inner[:, : k * R])
        errors.append((inner * size).sum(1))  # |E|^2 = <E, E>, term by term
        change = torch.cat([by_left[:, : k * R], by_right[:, : k * R]], 2)
        change.mul_(_of_terms(by_error[rows], R)[..., None])
        by_atom.index_add_(0, of_atoms[rows].flatten(), change.flatten(0, 1))
    of_terms = _joined_blocks(by_term)
    by_code = (of_terms if R == 1 else of_terms.unflatten(1, (k, R)).sum(2)) + chosen.of_bias
    return Decoded(_joined_blocks(errors), by_code * (chosen.code > 0) * weight, by_atom)


def _products_of_three(left: Tensor, right: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """E w of each term w and E^T v of each v, where E = sum_i size_i left_i right_i^T [n,terms,K], [n,terms,V]."""
    width, K = left.shape[1:]
    V = right.shape[2]
    if 2 * width * (K + V) < 3 * K * V:  # the cheaper order of a product of three, by 6 at k 4, or 2 at k 64
        by_left = ((right @ right.mT) * size[:, None]) @ left
        by_right = ((left @ left.mT) * size[:, None]) @ right
        return by_left, by_right
    matrix = (right * size[..., None]).mT @ left
    return right @ matrix, left @ matrix.mT


def _encoder_gradients(
    p: dict[str, Tensor], keys: Tensor, values: Tensor, chosen: Chosen, by_code: Tensor
) -> list[Tensor]:
    """[M F R,K] and [M F R,V], without what the bias adds. They are sums of rows: those for one term of an atom lie
    side by side, in a bag."""
    M, F, R, _ = p["v"].shape
    shape = chosen.of_keys.shape
    terms, order = _term_numbers(chosen.atoms, R).view(-1, 1, *shape[2:]).expand(shape).flatten().sort(stable=True)
    bags = torch.searchsorted(terms, _numbers_in(M * F * R, device=keys.device))
    # The bag of a term begins where it first appears; a bag of none is a row of zeros.
    rows = order // (shape[2] * R)  # of [M N S], each k R times

    def summed(side: Tensor, of_other_side: Tensor) -> Tensor:
        weights = (by_code[:, None, :, None] * of_other_side).flatten().index_select(0, order)
        return embedding_bag(rows, side.flatten(0, 2), bags, mode="sum", per_sample_weights=weights)

    return [summed(keys, chosen.of_values), summed(values, chosen.of_keys)]


def _bias_gradient(p: dict[str, Tensor], keys: Tensor, values: Tensor, by_shift: Tensor, by_product: Tensor) -> Tensor:
    """[M,K*V] of the mean error."""
    of_atoms = _outer_sums(p["v"] * by_product, p["w"])
    of_rows = _outer_sums(keys * (-2 / keys.shape[1]), values)
    of_encoder = _outer_sums(p["v_enc"] * by_shift, p["w_enc"])
    return (of_atoms + of_rows - of_encoder).flatten(1).add(p["b_dec"], alpha=2)


def _bias_errors(p: dict[str, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """[M,N] |B|^2 - 2 <X, B>."""
    bias = p["b_dec"].view(len(keys), keys.shape[3], values.shape[3])
    return bias.square().sum((1, 2))[:, None].sub((_side_products(keys, bias) * values).sum((2, 3)), alpha=2)


# ------------------------------------------------------------------------------------------------ dead atoms


def _with_aux(p: dict[str, Tensor], keys: Tensor, values: Tensor, step: Step, cfg: Config, dead: Dead | None) -> Step:
    """A step on rows [M,N,S,K] and [M,N,S,V] and SAELens' auxiliary loss of TopK, whose gradients it adds: of the dead
    atoms the most active ones, at most K V / 2, reconstruct what the step left.

    It takes the cheaper of two ways for D dead atoms: by inner products of atoms, D F (K + V) + N D (K + V + k + D), or
    by matrices, N D K V.
    """
    if dead is None:
        return step
    _, N, k = step.atoms.shape
    F = dead.atoms.shape[1]
    most_active = cfg.d_in // 2
    # Dead atoms first; where a dictionary has fewer than another, living ones fill up its places.
    index = dead.atoms.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : dead.most]
    v, w, v_enc, w_enc = (p[name].take_along_dim(index[..., None, None], 1) for name in FACTORS)
    bias = p["b_dec"].view(-1, cfg.d_k, cfg.d_v)
    shift = p["b_enc"].gather(1, index)
    if cfg.apply_b_dec_to_input:
        shift = shift - (_side_products(v_enc, bias) * w_enc).sum((2, 3))
    acts = inner_products(keys, values, v_enc, w_enc) + shift[:, None]
    norms = atom_norms(v, w).detach() if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
    is_dead = dead.atoms.gather(1, index)
    code = acts * _most_active(acts.detach() * norms[:, None], is_dead, min(most_active, dead.most))
    if (F / N + 1) * (cfg.d_k + cfg.d_v) + k + dead.most < cfg.d_in:  # by a factor of 3 to 14, one way or the other
        explained = _explained_products(p, step, v, w)
        without_bias = inner_products(keys, values, v, w) - (_side_products(v, bias.detach()) * w).sum((2, 3))[:, None]
        left = without_bias - explained
        errors = step.errors + ((code @ inner_products(v, w, v, w) - 2 * left) * code).sum(-1)
    else:
        left = _rows_left(p, step, keys.mT @ values - bias.detach()[:, None])
        atoms = khatri_rao(v.flatten(0, 1), w.flatten(0, 1)).view(-1, dead.most, cfg.d_in)
        errors = torch.baddbmm(left, code, atoms, alpha=-1).square().sum(-1)
    aux = (dead.atoms.sum(1).to(errors) / most_active).clamp_max(1) * errors.mean(1)
    (cfg.aux_loss_coefficient * aux).sum().backward()
    return step._replace(aux=aux.detach())


def _most_active(scores: Tensor, is_dead: Tensor, count: int) -> Tensor:
    """[M,N,D] 1 at the `count` largest scores of each row among atoms where `is_dead` [M,D], else 0."""
    is_dead = is_dead[:, None].expand_as(scores)
    top = scores.masked_fill(~is_dead, -torch.inf).topk(count, sorted=False).indices
    # With fewer dead atoms than that, living ones were taken too.
    return torch.zeros_like(scores).scatter(-1, top, 1) * is_dead


def _explained_products(p: dict[str, Tensor], step: Step, v: Tensor, w: Tensor) -> Tensor:
    """[M,N,D] inner products of atoms, [M,D,R,K] and [M,D,R,V], with what a step reconstructed, without its bias."""
    of_atoms = inner_products(p["v"].detach(), p["w"].detach(), v, w).flatten(0, 1)
    weights = step.code.flatten(0, 1)
    summed = embedding_bag(step.atoms.flatten(0, 1), of_atoms, mode="sum", per_sample_weights=weights)
    return summed.view(*step.errors.shape, -1)


def _rows_left(p: dict[str, Tensor], step: Step, x: Tensor) -> Tensor:
    """[M,N,K*V] rows [M,N,K,V] less what a step reconstructed, without its bias."""
    M, N, K, V = x.shape
    R = p["v"].shape[2]
    atoms = step.atoms.flatten(0, 1)
    keys = embedding(atoms, p["v"].detach().view(-1, R * K)).view(M * N, -1, K)
    values = embedding(atoms, p["w"].detach().view(-1, R * V)).view(M * N, -1, V)
    sizes = step.code.flatten(0, 1).repeat_interleave(R, 1)[..., None]
    return torch.baddbmm(x.flatten(0, 1), (keys * sizes).mT, values, alpha=-1).view(M, N, -1)


# ------------------------------------------------------------------------------------------------ numbers and sums


def atom_norms(v: Tensor, w: Tensor) -> Tensor:
    """[M,F] of atoms, above 0."""
    return ((v @ v.mT) * (w @ w.mT)).sum((2, 3)).clamp_min(1e-36).sqrt()


def _side_products(side: Tensor, matrices: Tensor) -> Tensor:
    """Vectors [M,F,R,D] times the matrix of their dictionary [M,D,D']."""
    return (side.flatten(1, 2) @ matrices).unflatten(1, side.shape[1:3])


def _outer_sums(keys: Tensor, values: Tensor) -> Tensor:
    """[M,K,V] sum of the outer products of vectors [M,F,R,K] and [M,F,R,V]."""
    return keys.flatten(1, 2).mT @ values.flatten(1, 2)


@lru_cache(maxsize=64)
def _numbers_in(*shape: int, device: torch.device, first: int = 0) -> Tensor:
    """Numbers one after the other in a shape, made once."""
    return torch.arange(first, first + math.prod(shape), device=device).view(shape)


def _term_numbers(atoms: Tensor, R: int) -> Tensor:
    """[M N,k R] numbers of the terms of atoms [M N,k]."""
    if R == 1:
        return atoms
    return (atoms[..., None] * R + _numbers_in(R, device=atoms.device)).flatten(1)


def _of_terms(x: Tensor, R: int) -> Tensor:
    """[M N,k R] numbers of atoms [M N,k] for each of their terms."""
    return x if R == 1 else x.repeat_interleave(R, 1)


def _by_atom(atoms: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[M,F,1,1] sums of x [M N,k] over the rows that have the atom."""
    sums = torch.zeros_like(p["b_enc"])
    sums.view(-1).index_add_(0, atoms.flatten(), x.flatten())
    return sums[..., None, None]


def _joined_blocks(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Blocks one after the other, in a dimension."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim)


def _row_blocks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    size = max(16, (BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(width, 1))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
