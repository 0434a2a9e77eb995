"""Encode and decode with matrix atoms, without building the dense dictionary.

An atom is A_f = sum_r v_f,r w_f,r^T, so the dictionary is the Khatri-Rao product of its factors. This file has the two
maps of an autoencoder, differentiable in all inputs, with their plain forms as reference:

    encode:  c_nf = <X_n, A_f>          [N,K*V] -> [N,F]
    decode:  Y_n  = sum_f c_nf A_f      [N,F] -> [N,K*V]

* Encoding needs every inner product: one GEMM over the product, which is built in slices that stay in cache.
* The backward pass of encoding, decoding, and its backward pass need only pairs (n, f) with c_nf != 0 (or with a
  gradient != 0). These pairs are gathered, at 2*R*K*V operations each instead of 2*K*V for every atom. They are found
  by their values, so that TopK, BatchTopK, JumpReLU and ReLU all profit. Where too many are active, the slices of the
  product are used instead.

Rows that are themselves sums of few outer products, X_n = sum_r k_nr u_nr^T (a write: R = 1 term in most families), are
encoded, and compared with what a code c_n reconstructs, from inner products alone, and none of them is built:

    encode_rows:    <X_n, A_f> = sum_rs (k_nr . v_fs) (u_nr . w_fs)                           [N,F]
    row_distances:  |X_n - B - Y_n|^2 - |X_n - B|^2 = c_n^T G c_n - 2 sum_f c_nf <X_n - B, A_f>  [N]
    gram:           G_fg = <A_f, A_g> = sum_rs (v_fr . v_gs) (w_fr . w_gs)                    [F,F]

The distance needs the Gram matrix of the active atoms of each row alone, which are gathered; where many are active, one
Gram matrix of all atoms is cheaper. Terms cancel in the error |X - Y|^2, which is therefore less exact than a sum of
squares by the ratio of |X|^2 to it, and is computed in at least fp32 whatever the dtype.

encode and decode are registered as torch operators: torch.compile then does not look into them and needs no shapes that
depend on data. The maps of low-rank rows are left out of compiled graphs for the same reason.

Alphabet: N rows, F atoms, R rank (for low-rank rows: R their terms, S the rank of atoms), K key side, V value side.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_GATHER_COST = 6
"""A gathered pair costs about this many times its share of a full GEMM (measured: benchmarks/sae_step.py)."""


class Block(NamedTuple):
    """Some rows and their active atoms, padded with value 0 to the fullest of these rows."""

    rows: Tensor
    """[n] row numbers."""
    atoms: Tensor
    """[n,m] atom numbers; where the value is 0, any atom."""
    values: Tensor
    """[n,m]"""


class _PairGradients(NamedTuple):
    dv: Tensor
    """[F,R,K]"""
    dw: Tensor
    """[F,R,V]"""
    dots: Tensor
    """[N,F] <M_n, A_f> where c_nf != 0, else 0; empty if not wanted."""


def khatri_rao(v: Tensor, w: Tensor) -> Tensor:
    """The atoms as rows, sum_r v_f,r w_f,r^T flattened key-first: [F,R,K], [F,R,V] -> [F,K*V]. Costs F*R*K*V."""
    return (v.mT @ w).flatten(1)


def atom_norm(v: Tensor, w: Tensor) -> Tensor:
    """Frobenius norm of sum_r v_f,r w_f,r^T: [F,R,K], [F,R,V] -> [F]. R = 1: |v||w|; else from the Gram matrices."""
    if v.shape[1] == 1:
        return (v.norm(dim=-1) * w.norm(dim=-1)).squeeze(1)
    square = ((v @ v.mT) * (w @ w.mT)).sum((-2, -1))
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def encode_reference(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """`encode` in plain form: the reference for tests, and what SAELens would do with a dense W_enc."""
    return x @ khatri_rao(v, w).T


def decode_reference(acts: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """`decode` in plain form: the reference for tests, and what SAELens would do with a dense W_dec."""
    return acts @ khatri_rao(v, w)


def encode(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Inner products of flattened matrices with every atom.

    Args:
        x: [...,K*V], key-first. Under autocast it is cast as a matmul would cast it.
        v, w: factors [F,R,K] and [F,R,V].

    Returns:
        [...,F]. Costs 2*F*K*V per row; the backward costs 4*R*K*V per entry of the gradient that is not zero.
    """
    flat = as_operand(x, v).reshape(-1, v.shape[-1] * w.shape[-1])
    return _encode(flat, v, w).reshape(*x.shape[:-1], v.shape[0])


def decode(acts: Tensor, v: Tensor, w: Tensor, *, full_gradient: bool = True) -> Tensor:
    """The sum of atoms weighted by activations.

    Args:
        acts: [...,F], mostly zero.
        v, w: factors [F,R,K] and [F,R,V].
        full_gradient: also compute the gradient of activations that are 0 (2*F*K*V per row). Training turns it off
            where the activation function blocks that gradient anyway (ReLU, TopK, BatchTopK), and saves a GEMM.

    Returns:
        [...,K*V], key-first. Costs 2*R*K*V per active pair.
    """
    flat = as_operand(acts, v).reshape(-1, v.shape[0])
    return _decode(flat, v, w, full_gradient).reshape(*acts.shape[:-1], v.shape[-1] * w.shape[-1])


def encode_rows(keys: Tensor, values: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Inner products of low-rank rows with every atom, differentiable in all of them.

    Args:
        keys, values: N rows of R terms, [N,R,K] and [N,R,V]. Under autocast they are cast as a matmul casts them.
        v, w: factors [F,S,K] and [F,S,V].

    Returns:
        [N,F]. Costs 2*R*S*(K+V) a pair; the backward only pairs whose gradient is not zero, if they are few.
    """
    operands = [as_operand(t, v) for t in (keys, values, v, w)]
    with torch.autocast(v.device.type, enabled=False):
        return _encode_rows(*operands)


def row_distances(
    keys: Tensor, values: Tensor, bias: Tensor, code: Tensor, v: Tensor, w: Tensor, *, full_gradient: bool = True
) -> Tensor:
    """|X_n - B - Y_n|^2 - |X_n - B|^2 for the reconstructions Y_n = sum_f code_nf A_f, differentiable in B, code, v
    and w.

    Args:
        keys, values: N rows of R terms, [N,R,K] and [N,R,V], taken as constants.
        bias: B [K,V].
        code: [N,F], mostly zero.
        v, w: factors [F,S,K] and [F,S,V].
        full_gradient: also compute the gradient of code where it is 0, which needs the Gram matrix of all atoms.

    Returns:
        [N] in at least fp32. With m active atoms a row it costs m*S*(R + m*S)*(K+V) a row; with all of them
        F^2*S^2*(K+V) once and F^2 + F*R*S*(K+V) a row.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        keys, values, bias, code, v, w = (t.to(exact) for t in (keys, values, bias, code, v, w))
        products = matrix_products(bias, v, w)
        counts = None if full_gradient else _few_active(code, keys.shape[1], v, w)
        if counts is None:
            inner = _encode_rows(keys, values, v, w) - products
            return ((code @ gram(v, w, v, w) - 2 * inner) * code).sum(-1)
        index, parts = [counts.new_zeros(0)], [code.new_zeros(0)]
        for block in blocks(code.detach(), counts, v, w):
            at = block.rows[:, None] * code.shape[1] + block.atoms
            active = code.flatten().index_select(0, at.flatten()).view(at.shape)
            active = torch.where(block.values != 0, active, 0)
            sides = keys.index_select(0, block.rows), values.index_select(0, block.rows)
            index.append(block.rows)
            parts.append(gathered_distances(*sides, products, active, block.atoms, v, w))
        return code.new_zeros(len(code)).index_add(0, torch.cat(index), torch.cat(parts))


def gram(v: Tensor, w: Tensor, v2: Tensor, w2: Tensor) -> Tensor:
    """<A_f, B_g> [F,G] for atoms [F,S,K], [F,S,V] and [G,S,K], [G,S,V]."""
    product = (v.flatten(0, 1) @ v2.flatten(0, 1).T) * (w.flatten(0, 1) @ w2.flatten(0, 1).T)
    S = v.shape[1]
    return product if S == 1 else product.view(len(v), S, len(v2), S).sum((1, 3))


def matrix_products(matrix: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<M, A_f> [F] of one matrix [K,V] with every atom. Costs F*S*K*V, once and not for each row."""
    return ((v.flatten(0, 1) @ matrix) * w.flatten(0, 1)).sum(-1).view(v.shape[:2]).sum(-1)


def _few_active(code: Tensor, terms: int, v: Tensor, w: Tensor) -> Tensor | None:
    """Active atoms per row [N], or None where the Gram matrix of all atoms is cheaper than those of the rows."""
    counts = (code != 0).sum(-1)
    F, S, sides = v.shape[0], v.shape[1], v.shape[2] + w.shape[2]
    width = (counts * S).double()
    gathered = float((width * (width + terms + _GATHER_COST)).sum()) * sides
    everything = ((F * S) ** 2 + len(code) * F * S * terms) * sides + len(code) * F**2
    return counts if gathered <= everything else None


def as_operand(t: Tensor, factors: Tensor) -> Tensor:
    """`t` in the dtype of a matmul with `factors`: that of autocast where it is on, else that of the factors."""
    kind = t.device.type
    return t.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else factors.dtype)


# ---------------------------------------------------------------------------------------------- operators


_OPTIONS: Any = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):  # how many pairs are active is read back from the device
    _OPTIONS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("sae_lens_writesae::encode", **_OPTIONS)
def _encode(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _project(x, v, w)


@torch.library.custom_op("sae_lens_writesae::decode", **_OPTIONS)
def _decode(acts: Tensor, v: Tensor, w: Tensor, full_gradient: bool) -> Tensor:
    with torch.autocast(acts.device.type, enabled=False):
        return _combine(acts, v, w)


@torch.library.custom_op("sae_lens_writesae::pair_gradients", **_OPTIONS)
def _pair_gradients_op(m: Tensor, c: Tensor, v: Tensor, w: Tensor, want_dots: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(m.device.type, enabled=False):
        return _pair_gradients(m, c, v, w, want_dots)


@_encode.register_fake
def _(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], v.shape[0])


@_decode.register_fake
def _(acts: Tensor, v: Tensor, w: Tensor, full_gradient: bool) -> Tensor:
    return acts.new_empty(acts.shape[0], v.shape[-1] * w.shape[-1])


@_pair_gradients_op.register_fake
def _(m: Tensor, c: Tensor, v: Tensor, w: Tensor, want_dots: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(w), c.new_empty(c.shape if want_dots else (0, c.shape[1]))


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.full_gradient = inputs[3]


def _encode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v, w = ctx.saved_tensors
    dx = _decode(grad, v, w, False) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):
        return dx, None, None
    dv, dw, _ = _pair_gradients_op(x, grad, v, w, False)
    return dx, dv, dw


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    acts, v, w = ctx.saved_tensors
    want, full = ctx.needs_input_grad[0], ctx.full_gradient
    dacts = _encode(grad, v, w) if want and full else None
    if any(ctx.needs_input_grad[1:3]) or (want and not full):
        dv, dw, dots = _pair_gradients_op(grad, acts, v, w, want and not full)
        return dots if want and not full else dacts, dv, dw, None
    return dacts, None, None, None


_encode.register_autograd(_encode_backward, setup_context=_setup_encode)
_decode.register_autograd(_decode_backward, setup_context=_setup_decode)


# ---------------------------------------------------------------------------------------------- arithmetic


def _budget(device: torch.device) -> int:
    """How many numbers of the product, or of gathered factors, are held at once: on CPU 16 MB in fp32, about a
    last-level cache; on an accelerator 256 MB, because small products do not fill the device."""
    return 4_194_304 if device.type == "cpu" else 67_108_864


def _slices(v: Tensor, w: Tensor) -> Iterator[slice]:
    """Ranges of atoms whose product fits the budget."""
    size = max(16, _budget(v.device) // (v.shape[-1] * w.shape[-1]))
    return (slice(i, i + size) for i in range(0, v.shape[0], size))


def _product(v: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """A slice of the product in `dtype`. Multiplied in at least fp32, so that it is rounded once, not three times."""
    exact = torch.promote_types(v.dtype, torch.float32)
    return khatri_rao(v.to(exact), w.to(exact)).to(dtype)


def _project(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<X_n, A_f> for all pairs."""
    out = x.new_empty(x.shape[0], v.shape[0])
    for s in _slices(v, w):
        out[:, s] = x @ _product(v[s], w[s], x.dtype).T
    return out


def _combine(c: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """sum_f c_nf A_f for all rows."""
    N, K, V = c.shape[0], v.shape[-1], w.shape[-1]
    counts = _sparse_counts(c, v)
    out = c.new_zeros(N, K * V)
    if counts is None:
        for s in _slices(v, w):
            out.addmm_(c[:, s], _product(v[s], w[s], c.dtype))
        return out
    for block in blocks(c, counts, v, w):
        weighted = (v[block.atoms] * block.values[..., None, None]).to(c.dtype).flatten(1, 2)
        out[block.rows] = (weighted.mT @ w[block.atoms].to(c.dtype).flatten(1, 2)).flatten(1)
    return out


def _pair_gradients(m: Tensor, c: Tensor, v: Tensor, w: Tensor, want_dots: bool) -> _PairGradients:
    """Gradients of sum_nf c_nf <M_n, A_f> with respect to v and w, and on request to c where c is not zero.

    Sums over rows run in at least fp32 and are rounded once.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    dv, dw = torch.zeros_like(v, dtype=exact), torch.zeros_like(w, dtype=exact)
    dots = c.new_zeros(c.shape if want_dots else (0, c.shape[1]))
    counts = _sparse_counts(c, v)
    if counts is None:
        _dense_gradients(m, c, v, w, dv, dw)
        if want_dots:
            dots = _project(m, v, w) * (c != 0)
    else:
        for block in blocks(c, counts, v, w):
            _gathered_gradients(m, block, v, w, dv, dw, dots if want_dots else None)
    return _PairGradients(dv.to(v.dtype), dw.to(w.dtype), dots)


def _dense_gradients(m: Tensor, c: Tensor, v: Tensor, w: Tensor, dv: Tensor, dw: Tensor) -> None:
    """One GEMM per slice of atoms, then two small products with the factors; fills dv and dw."""
    for s in _slices(v, w):
        d = (c[:, s].T @ m).view(-1, v.shape[-1], w.shape[-1])
        dv[s] = (w[s].to(d.dtype) @ d.mT).to(dv.dtype)
        dw[s] = (v[s].to(d.dtype) @ d).to(dw.dtype)


def _gathered_gradients(
    m: Tensor, block: Block, v: Tensor, w: Tensor, dv: Tensor, dw: Tensor, dots: Tensor | None
) -> None:
    """Add the active pairs of a block to dv and dw, and put their inner products into dots."""
    (n, j), R = block.atoms.shape, v.shape[1]
    vs = v[block.atoms].to(m.dtype).flatten(1, 2)  # [n,j*R,K]
    ws = w[block.atoms].to(m.dtype).flatten(1, 2)
    matrices = m[block.rows].view(n, v.shape[-1], w.shape[-1])
    mw = ws @ matrices.mT  # [n,j*R,K]
    vm = vs @ matrices  # [n,j*R,V]
    if dots is not None:
        values = (mw * vs).sum(-1).view(n, j, R).sum(-1) * (block.values != 0)
        # Added, because the padding may name an atom that is active.
        dots.index_put_((block.rows[:, None], block.atoms), values.to(dots.dtype), accumulate=True)
    coefficient = block.values.to(dv.dtype)[..., None, None]
    at = block.atoms.flatten()
    dv.index_add_(0, at, (coefficient * mw.view(n, j, R, -1)).flatten(0, 1))
    dw.index_add_(0, at, (coefficient * vm.view(n, j, R, -1)).flatten(0, 1))


def _sparse_counts(c: Tensor, v: Tensor) -> Tensor | None:
    """Active atoms per row [N], or None where gathering them would cost more than the full GEMM."""
    counts = (c != 0).sum(-1)
    return counts if int(counts.sum()) * v.shape[1] * _GATHER_COST <= c.numel() else None


def blocks(c: Tensor, counts: Tensor, v: Tensor, w: Tensor) -> Iterator[Block]:
    """Rows grouped by their number of active atoms, so that one row with many does not pad the others."""
    pairs = c.flatten().nonzero().squeeze(1)  # row by row
    atoms, values = pairs % c.shape[1], c.flatten().index_select(0, pairs)
    first = counts.cumsum(0) - counts
    order = counts.argsort(descending=True, stable=True)
    widths = counts[order].tolist()
    start, budget, factor_floats = 0, _budget(v.device), v.shape[1] * (v.shape[-1] + w.shape[-1])
    while start < len(widths) and (width := widths[start]):
        size = max(1, budget // (width * factor_floats + v.shape[-1] * w.shape[-1]))
        rows = order[start : start + size]
        places = torch.arange(width, device=c.device)
        at = (first[rows][:, None] + places).clamp_max(len(pairs) - 1)
        block = Block(rows, atoms[at], values[at])
        if widths[min(start + size, len(widths)) - 1] < width:
            block = block._replace(values=torch.where(places < counts[rows][:, None], block.values, 0))
        yield block
        start += size


# ---------------------------------------------------------------------------------------------- low-rank rows


class _EncodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, v: Tensor, w: Tensor) -> Tensor:
        left = keys.flatten(0, 1) @ v.flatten(0, 1).T  # [N*R,F*S]
        right = values.flatten(0, 1) @ w.flatten(0, 1).T
        ctx.save_for_backward(keys, values, v, w, left, right)
        return _sum_terms(left * right, keys.shape[1], v.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, v, w, left, right = ctx.saved_tensors
        grad, (N, R), (F, S) = grads[0], keys.shape[:2], v.shape[:2]
        rows_need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if not rows_need and int(torch.count_nonzero(grad)) * _GATHER_COST * 2 <= N * F:
            pair = grad.flatten().nonzero().squeeze(1)
            n, f = pair // F, pair % F
            c = grad.flatten().index_select(0, pair)[:, None, None]
            at_right, at_left = (_at_pairs(side, pair, n, f, R, S) * c for side in (right, left))  # [P,R,S]
            dv = torch.zeros_like(v).index_add_(0, f, _outer(at_right.mT, keys.index_select(0, n)))
            dw = torch.zeros_like(w).index_add_(0, f, _outer(at_left.mT, values.index_select(0, n)))
            return None, None, dv, dw
        wide = grad[:, None, :, None].expand(N, R, F, S).reshape(N * R, F * S)
        dleft, dright = wide * right, wide * left
        return (
            (dleft @ v.flatten(0, 1)).view_as(keys) if rows_need else None,
            (dright @ w.flatten(0, 1)).view_as(values) if rows_need else None,
            (dleft.T @ keys.flatten(0, 1)).view_as(v),
            (dright.T @ values.flatten(0, 1)).view_as(w),
        )


class _Gathered(torch.autograd.Function):
    """`row_distances` where the m active atoms of each row are known: active, atoms [N,m] -> [N]; products [F] are
    those of the bias with the atoms."""

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, products: Tensor, active: Tensor, atoms: Tensor, v: Tensor, w: Tensor
    ) -> Tensor:
        (N, m), S = atoms.shape, v.shape[1]
        vs = v.index_select(0, atoms.flatten()).view(N, m * S, -1)
        ws = w.index_select(0, atoms.flatten()).view(N, m * S, -1)
        c = active.repeat_interleave(S, dim=1) if S > 1 else active
        left, right = vs @ keys.mT, ws @ values.mT  # [N,m*S,R]
        gram_v, gram_w = vs @ vs.mT, ws @ ws.mT
        inner = (left * right).sum(-1)
        weighted = ((gram_v * gram_w) @ c[..., None]).squeeze(-1)  # sum_j c_j <term i, term j>
        biased = products.index_select(0, atoms.flatten()).view(N, m)
        error = weighted - inner
        ctx.save_for_backward(keys, values, atoms, v, w, vs, ws, active, biased, left, right, gram_v, gram_w, error)
        return ((weighted - 2 * inner) * c).sum(-1) + 2 * (biased * active).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, atoms, v, w, vs, ws, active, biased, left, right, gram_v, gram_w, error = ctx.saved_tensors
        g, S = 2 * grads[0][:, None], v.shape[1]
        dactive = (error * g).view(*atoms.shape, -1).sum(-1) + biased * g
        c = active.repeat_interleave(S, dim=1) if S > 1 else active
        pairs = (c * g)[..., None] * c[:, None, :]
        scale = (c * g)[..., None]
        # Each is the gradient of a gathered copy: the residual matrix times the other side of the term.
        dvs = _outer(pairs * gram_w, vs).sub_(_outer(scale * right, keys))
        dws = _outer(pairs * gram_v, ws).sub_(_outer(scale * left, values))
        at = atoms.flatten()
        dv = torch.zeros_like(v).index_add_(0, at, dvs.view(len(at), *v.shape[1:]))
        dw = torch.zeros_like(w).index_add_(0, at, dws.view(len(at), *w.shape[1:]))
        dproducts = v.new_zeros(len(v)).index_add_(0, at, (active * g).flatten())
        return None, None, dproducts, dactive, None, dv, dw


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of which a batched product over one term would be slow."""
    return a * b if b.shape[-2] == 1 else a @ b


def _at_pairs(side: Tensor, pair: Tensor, n: Tensor, f: Tensor, R: int, S: int) -> Tensor:
    """[N*R,F*S] at pairs of a row and an atom: [P,R,S]."""
    if R == S == 1:
        return side.flatten().index_select(0, pair)[:, None, None]
    return side.view(-1, R, side.shape[1] // S, S)[n, :, f]


def _sum_terms(product: Tensor, R: int, S: int) -> Tensor:
    """[N*R,F*S] -> [N,F], the sum over the terms of rows and atoms."""
    return product if R == S == 1 else product.view(-1, R, product.shape[1] // S, S).sum((1, 3))


# How many pairs are active depends on the data: torch.compile must not look into these.
_encode_rows: Callable[..., Tensor] = cast(Any, torch.compiler.disable)(_EncodeRows.apply)
gathered_distances: Callable[..., Tensor] = cast(Any, torch.compiler.disable)(_Gathered.apply)
