"""The two maps against their plain forms, the views, the folds, and what the config refuses."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import SAE
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_writesae import sae as S
from sae_lens_writesae.atom import sparse
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.atom.sparse import atom_norm
from sae_lens_writesae.sae.base import MatrixWeights

K, V, D_IN, F = 5, 6, 30, 12
ALL_VARIANTS = [
    {"encoder": e, "decoder": d, "rank": r}
    for e in ("bilinear", "tied", "dense")
    for d in ("rank", "flat")
    for r in (1, 2)
]


def small(name: str = "writesae_standard", training: bool = False, seed: int = 0, **fields):
    """A small fp64 autoencoder with every parameter drawn at random."""
    torch.manual_seed(seed)
    sae_class, cfg_class = (S.TRAINING if training else S.INFERENCE)[name]
    shape = {"d_in": D_IN, "d_sae": F, "d_k": K, "d_v": V, "dtype": "float64"}
    sae = sae_class(cfg_class(**(shape | fields)))
    for parameter in sae.parameters():
        parameter.data.copy_(0.5 * torch.randn_like(parameter))
    for name in ("threshold", "encoder_scale"):  # these are positive
        if (tensor := getattr(sae, name, None)) is not None:
            tensor.data.abs_().add_(0.1)
    return sae


def problem(n: int, f: int, r: int, k: int, v: int, active: int, seed: int = 0):
    """Rows, activations with `active` entries per row on average (unevenly), and factors, all fp64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    acts = draw(n, f) * (torch.rand(n, f, generator=g) < active / f * 2 * torch.rand(n, 1, generator=g))
    return draw(n, k * v), acts, draw(f, r, k), draw(f, r, v)


# ---------------------------------------------------------------------------------------- maps


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 6),
    f=st.integers(1, 40),
    r=st.integers(1, 3),
    k=st.integers(1, 5),
    v=st.integers(1, 6),
    active=st.sampled_from([0, 1, 3, 40]),
)
def test_maps_and_gradients_equal_the_plain_forms(n: int, f: int, r: int, k: int, v: int, active: int) -> None:
    x, acts, fv, fw = problem(n, f, r, k, v, active)
    mask = (acts != 0).double()
    results = []
    for enc, dec in ((sparse.encode, sparse.decode), (sparse.encode_reference, sparse.decode_reference)):
        leaves = [t.clone().requires_grad_() for t in (x, acts, fv, fw)]
        # The mask stands for TopK: the encoder's gradient is sparse, and more so with fewer active atoms.
        hidden, y = enc(leaves[0], *leaves[2:]), dec(leaves[1], *leaves[2:])
        loss = (hidden * mask).sin().sum() + y.square().sum()
        results.append([hidden, y, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2])
def test_gradcheck(rank: int) -> None:
    x, acts, v, w = (t.requires_grad_() for t in problem(2, 40, rank, 2, 3, 2))
    assert torch.autograd.gradcheck(sparse.encode, (x, v, w))
    mask = acts != 0
    assert 0 < mask.sum() * 6 * rank < mask.numel(), "the gathered path is not the one tested"
    # Zeros stay zero: finite differences must not switch further atoms on.
    assert torch.autograd.gradcheck(lambda a, v, w: sparse.decode(a * mask, v, w, full_gradient=False), (acts, v, w))
    assert torch.autograd.gradcheck(lambda v, w: sparse.encode(x.detach(), v, w) * mask, (v, w))
    assert torch.autograd.gradcheck(sparse.decode, (acts, v, w))


def test_blocked_gradient_is_zero_where_nothing_is_active() -> None:
    x, acts, v, w = problem(4, 40, 1, K, V, 3)
    acts.requires_grad_()
    (blocked,) = torch.autograd.grad((sparse.decode(acts, v, w, full_gradient=False) * x).sum(), acts)
    (full,) = torch.autograd.grad((sparse.decode(acts, v, w) * x).sum(), acts)
    torch.testing.assert_close(blocked, full * (acts != 0), rtol=1e-12, atol=1e-12)
    assert full[acts == 0].abs().min() > 0


def test_leading_axes_and_a_crowded_row_beside_empty_ones() -> None:
    x, _, v, w = problem(6, 200, 2, K, V, 0)
    acts = torch.zeros(6, 200, dtype=torch.float64)
    acts[2, :30], acts[5, 7] = 1.0, -2.0
    expected = sparse.decode_reference(acts, v, w)
    got = sparse.decode(acts.view(2, 3, 200), v, w)
    torch.testing.assert_close(got, expected.view(2, 3, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse.encode(x.view(3, 2, -1), v, w).view(6, -1), sparse.encode_reference(x, v, w))


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast: bool) -> None:
    x, acts, v, w = (t.float() for t in problem(16, 200, 1, 16, 12, 4))
    exact = sparse.encode_reference(x, v, w), sparse.decode_reference(acts, v, w)
    factors = [t.clone().requires_grad_() if autocast else t.bfloat16().requires_grad_() for t in (v, w)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, y = sparse.encode(x, *factors), sparse.decode(acts, *factors)
    for got, wanted in zip((hidden, y), exact):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).norm() < 1e-2 * wanted.norm()
    (hidden.float().relu().sum() + y.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in factors)


def test_peak_allocation_stays_far_below_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    # 4096 atoms of 32 x 32: the product has 2^22 floats, and no tensor on the way may exceed a sixteenth of that.
    x, acts, v, w = (t.float() for t in problem(8, 4096, 1, 32, 32, 8))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(sparse, "_budget", lambda device: 2**18)
    with Watch():
        sparse._project(x, v, w)
        sparse._combine(acts, v, w)
        sparse._pair_gradients(x, acts, v, w, True)
    assert 0 < largest <= 2**18


# ---------------------------------------------------------------------------------------- views and atoms


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_views_are_the_maps(variant: dict) -> None:
    sae, x = small(**variant), torch.randn(7, D_IN, dtype=torch.float64)
    assert sae.W_enc.shape == (D_IN, F) and sae.W_dec.shape == (F, D_IN)
    acts = torch.relu(torch.randn(7, F, dtype=torch.float64))
    torch.testing.assert_close(sae.encode_linear(x), x @ sae.W_enc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode_linear(acts), acts @ sae.W_dec, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decoder_norm(), sae.W_dec.norm(dim=-1))
    torch.testing.assert_close(sae.encoder_norm(), sae.W_enc.norm(dim=0))
    torch.testing.assert_close(sae.atoms().dense().flatten(1), sae.W_dec.detach())
    names = {name for name, _ in sae.named_parameters()}
    assert ("decoder_matrix" in names) == (variant["decoder"] == "flat")
    assert ("encoder_matrix" in names) == (variant["encoder"] == "dense")
    assert ("v_enc" in names) == (variant["encoder"] == "bilinear")


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_rank_one_inputs_need_no_matrix(variant: dict) -> None:
    sae = small("writesae_topk", k=3, **variant)
    keys, values = torch.randn(2, 4, K, dtype=torch.float64), torch.randn(2, 4, V, dtype=torch.float64)
    dense = (keys[..., :, None] * values[..., None, :]).flatten(-2)
    torch.testing.assert_close(sae.encode_writes(keys, values), sae.encode(dense), rtol=1e-10, atol=1e-10)


def test_atom_norm_and_its_gradient() -> None:
    for rank in (1, 3):
        v, w = torch.randn(4, rank, K, dtype=torch.float64), torch.randn(4, rank, V, dtype=torch.float64)
        torch.testing.assert_close(atom_norm(v, w), sparse.khatri_rao(v, w).norm(dim=1))
        assert torch.autograd.gradcheck(atom_norm, (v.requires_grad_(), w.requires_grad_()))
    zero = torch.zeros(1, 2, K, requires_grad=True)
    atom_norm(zero, zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_atoms_are_the_closest_of_their_rank() -> None:
    flat = small(decoder="flat", encoder="dense", rank=2)
    atoms, dense = flat.atoms([3, 1], rank=2), flat.decoder_matrix[[3, 1]].view(-1, K, V)
    assert atoms.keys.shape == (2, 2, K) and atoms.values.shape == (2, 2, V)
    torch.testing.assert_close(atoms.keys.norm(dim=-1), atoms.values.norm(dim=-1))
    rest = dense - atoms.dense()
    singular = torch.linalg.svdvals(dense)
    torch.testing.assert_close(rest.flatten(1).norm(dim=1), singular[:, 2:].norm(dim=1))
    ranked = small(rank=2)
    assert torch.equal(ranked.atoms().dense().flatten(1), ranked.W_dec)
    assert ranked.atoms(rank=1).keys.shape == (F, 1, K)
    matrix = torch.randn(1, K, V)
    torch.testing.assert_close(LowRank.svd(matrix, K, balanced=True).dense(), matrix)


# ---------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["writesae_topk", "writesae_jumprelu", "writesae_standard", "writesae_gated"])
@pytest.mark.parametrize("training", [False, True])
def test_folds_leave_the_function_unchanged(name: str, variant: dict, training: bool) -> None:
    fields = {"k": 4, "rescale_acts_by_decoder_norm": True} if name == "writesae_topk" else {}
    fields["normalize_activations"] = "expected_average_only_in"
    sae, x = small(name, training, **fields, **variant), torch.randn(9, D_IN, dtype=torch.float64)
    scale = 2.5
    before = sae(x * scale) / scale
    assert before.std() > 0
    stored = {n: p.data_ptr() for n, p in sae.named_parameters()}
    sae.fold_activation_norm_scaling_factor(scale)
    assert sae.cfg.normalize_activations == "none"
    torch.testing.assert_close(sae(x), before, rtol=1e-10, atol=1e-10)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(x), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae.decoder_norm(), torch.ones(F, dtype=torch.float64))
    sae.balance_factors()
    torch.testing.assert_close(sae(x), before, rtol=1e-10, atol=1e-10)
    kept = {n: p.data_ptr() for n, p in sae.named_parameters() if n != "threshold"}  # SAELens itself moves that one
    assert all(stored[n] == pointer for n, pointer in kept.items())


def test_balanced_factors_have_equal_norms() -> None:
    sae = small(rank=2)
    sae.v.data[3] = 0
    sae.balance_factors()
    live = torch.arange(F) != 3
    torch.testing.assert_close(sae.v.norm(dim=-1)[live], sae.w.norm(dim=-1)[live])
    assert sae.w.isfinite().all()


@pytest.mark.parametrize("name", S.INFERENCE)
def test_whitening_is_refused_before_anything_changes(name: str) -> None:
    needed = {"writesae_topk": {"k": 4, "rescale_acts_by_decoder_norm": True}, "writesae_product": {"f_key": 3}}
    sae = small(name, **needed.get(name, {}))
    state = {n: t.clone() for n, t in sae.state_dict().items()}
    eye = torch.eye(D_IN, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="expected_average_only_in"):
        sae.fold_activation_whitening(eye[0], eye, eye)
    assert all(torch.equal(t, state[n]) for n, t in sae.state_dict().items())


WRITES_TO_WEIGHTS = re.compile(r"W_(enc|dec)(\.data|\s*=[^=])|state_dict\[.W_(enc|dec)|_fold_norm_topk")


@pytest.mark.parametrize("sae_class", [pair[0] for pair in [*S.INFERENCE.values(), *S.TRAINING.values()]])
def test_no_method_of_saelens_that_writes_to_weights_is_left(sae_class: type) -> None:
    found = 0
    for position, base in enumerate(sae_class.__mro__):
        if not base.__module__.startswith("sae_lens."):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and WRITES_TO_WEIGHTS.search(inspect.getsource(method)):
                found += 1
                ours = [c for c in sae_class.__mro__[:position] if c.__module__.startswith("sae_lens_writesae")]
                shadows = [vars(c)[name] for c in ours if name in vars(c)]
                assert shadows, f"{base.__name__}.{name} writes through a view and nothing of ours comes before it"
                # The last of ours before it must not pass the call on.
                assert f"super().{name}" not in inspect.getsource(shadows[-1])
    assert found >= 4, "SAELens has changed: look for how it writes to its weights now"


def test_saelens_still_declares_what_is_replaced() -> None:
    for name in ("initialize_weights", "fold_activation_norm_scaling_factor", "fold_and_get_W_dec_norm"):
        assert name in vars(SAE) and name in vars(MatrixWeights)


# ---------------------------------------------------------------------------------------- errors


SHAPE = {"d_in": 30, "d_sae": 12, "d_k": 5, "d_v": 6}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"d_k": 4}, r"4 \* 6 = 24, but d_in=30"),
        ({"d_k": 0, "d_v": 0}, "d_k=0 and d_v=0"),
        ({"d_k": 0, "d_v": 7}, r"4 \* 7 = 28"),
        ({"d_k": -5, "d_v": -6}, "d_k=-5"),
        ({"rank": 0}, "rank=0.*between 1 and"),
        ({"rank": 6}, r"rank=6.*min\(5, 6\)"),
        ({"encoder": "linear"}, "encoder='linear'.*bilinear"),
        ({"decoder": "full"}, "decoder='full'.*flat"),
        ({"d_sae": 0}, "d_sae=0"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'.*expected_average_only_in"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    ],
)
def test_configs_refuse_what_matrix_atoms_cannot_be(fields: dict, message: str) -> None:
    for _, cfg_class in (S.INFERENCE["writesae_standard"], S.TRAINING["writesae_standard"]):
        with pytest.raises(ValueError, match=message):
            cfg_class(**(SHAPE | fields))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("writesae_topk", {"k": 0}, "k=0.*d_sae=12"),
        ("writesae_topk", {"k": 13}, "k=13.*d_sae=12"),
        ("writesae_topk", {"k": 2.5}, "k=2.5.*integer"),
        ("writesae_batchtopk", {"k": -1}, "k=-1"),
        ("writesae_topk", {"k": 4, "k_aux": 13}, "k_aux=13"),
        ("writesae_topk", {"k": 4, "k_aux": -1}, "k_aux=-1"),
        ("writesae_topk", {"k": 4, "aux_loss_coefficient": -1.0}, "aux_loss_coefficient=-1.0"),
        ("writesae_topk", {"k": 4, "use_sparse_activations": True}, "use_sparse_activations"),
        ("writesae_topk", {"k": 4, "rescale_acts_by_decoder_norm": False}, "unit_norm_every=100"),
        ("writesae_batchtopk", {"k": 4, "topk_threshold_lr": 0.0}, "topk_threshold_lr=0.0"),
        ("writesae_standard", {"decoder_init_norm": 0.0}, "decoder_init_norm=0.0"),
        ("writesae_standard", {"b_dec_init": "median"}, "b_dec_init='median'"),
        ("writesae_standard", {"resample_every": -1}, "resample_every=-1"),
        ("writesae_jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, "target_l0"),
    ],
)
def test_training_configs_refuse_nonsense(name: str, fields: dict, message: str) -> None:
    sae_class, cfg_class = S.TRAINING[name]
    with pytest.raises(ValueError, match=message):
        sae_class(cfg_class(**SHAPE, **fields))


def test_one_width_follows_from_the_other() -> None:
    cfg = S.WriteStandardSAEConfig(d_in=30, d_sae=12, d_k=5)
    assert (cfg.d_k, cfg.d_v) == (5, 6)


@pytest.mark.parametrize("encoder", ["bilinear", "dense", "tied"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_input_that_is_not_finite_is_refused(bad: float, encoder: str) -> None:
    sae, x = small(encoder=encoder), torch.randn(8, D_IN, dtype=torch.float64)
    x[5, 3] = bad
    with pytest.raises(ValueError, match=r"\[8, 30\] has NaN or infinite values in 1 rows, the first being row 5"):
        sae.encode(x)
    keys = torch.full((2, K), bad, dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sae.encode_writes(keys, torch.ones(2, V, dtype=torch.float64))
    for parameter in sae.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite|weights hold NaN"):
        sae.encode(torch.ones(1, D_IN))


def test_large_but_finite_values_pass() -> None:
    sae = small(dtype="float32").to(dtype=torch.float32)
    acts = sae.encode(torch.full((400, D_IN), 1e36))
    assert acts.isfinite().all()
