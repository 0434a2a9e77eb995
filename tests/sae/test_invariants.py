"""What holds for every architecture: one table, architecture by invariant, over generated shapes and settings.

Each test is an invariant. What is special to one architecture or to the upkeep is in `test_base.py` and
`test_sae_training.py`; that killed runs resume is in `test_checkpoints.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted, SmallWrites, recovery, trained, untrained
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from saes import close, drawn_sae, normal, positive, train_step
from torch import Tensor
from torch.nn.functional import cosine_similarity

import sae_lens_writesae as W
from sae_lens_writesae import sae as S
from sae_lens_writesae.sae.metric import Metric

STOCK = {
    "writesae_topk": "topk",
    "writesae_batchtopk": "batchtopk",
    "writesae_matryoshka": "matryoshka_batchtopk",
    "writesae_jumprelu": "jumprelu",
    "writesae_standard": "standard",
    "writesae_gated": "gated",
}
"""Architectures for which SAELens has a class that does the same on dense matrices, and its name."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "writesae_topk": [{}, {"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}],
    "writesae_matryoshka": [{}, {"use_matryoshka_aux_loss": True}],
    "writesae_jumprelu": [
        {},
        {"jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 0.1},
        {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0, "jumprelu_ste_to_input": True},
    ],
    "writesae_standard": [{}, {"lp_norm": 0.5}],
}
generated = settings(max_examples=12, deadline=None, derandomize=True)
few = settings(generated, max_examples=5)
"""Of what writes files."""
each_architecture = pytest.mark.parametrize("name", S.TRAINING)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Case(NamedTuple):
    """An architecture with settings."""

    name: str
    fields: dict[str, Any]
    seed: int

    def sae(self, known: Any = S.TRAINING, **changes: Any) -> Any:
        fields = self.fields if known is S.TRAINING else {n: x for n, x in self.fields.items() if n in SHARED}
        return drawn_sae(self.name, known, seed=self.seed, **fields | changes)

    def rows(self, n: int = 11) -> Tensor:
        """[n,K*V] in float64."""
        return normal(n, self.fields["d_in"], seed=self.seed + 1)


SHARED = ("d_in", "d_k", "d_v", "d_sae", "dtype", "encoder", "decoder", "rank", "normalize_activations")
"""Fields that a config for inference has as well."""


@st.composite
def cases(draw: Any, name: str, **fields: Any) -> Case:
    """K != V, any sides and rank, and options of the architecture."""
    K, V = draw(st.tuples(st.integers(2, 6), st.integers(2, 6)).filter(lambda sides: sides[0] != sides[1]))
    shape = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": draw(st.integers(8, 16)), "dtype": "float64"}
    sides = {
        "encoder": draw(st.sampled_from(["bilinear", "tied", "dense"])),
        "decoder": draw(st.sampled_from(["rank", "flat"])),
        "rank": draw(st.integers(1, min(K, V))),
    }
    options = draw(st.sampled_from(OPTIONS.get(name, [{}])))
    return Case(name, shape | sides | options | fields, draw(st.integers(0, 99)))


# ---- factored = dense


def stock_twin(sae: Any) -> Any:
    """SAELens' own class with the same options and the dense matrices that the factors stand for."""
    stock, config_class = sae_lens.registry.get_sae_training_class(STOCK[sae.cfg.architecture()])
    fields = {f: v for f, v in sae.cfg.to_dict().items() if f in config_class.__dataclass_fields__ and f != "metadata"}
    twin = stock(config_class(**fields))
    own = sae.state_dict() | {"W_enc": sae.W_enc.detach(), "W_dec": sae.W_dec.detach()}
    twin.load_state_dict({name: own[name] for name in twin.state_dict()})
    return twin


def chain_rule(sae: Any, twin: Any) -> dict[str, Tensor]:
    """Gradients of the twin's matrices, carried over to the factors by hand."""
    grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    g_enc, g_dec = grads.pop("W_enc").T, grads.pop("W_dec")  # both [F,K*V]
    if sae.cfg.encoder == "tied":
        g_dec = g_dec + g_enc
    sides = {"bilinear": ("v_enc", "w_enc", g_enc), "rank": ("v", "w", g_dec)}
    for kind in {sae.cfg.encoder, sae.cfg.decoder} & sides.keys():
        v, w, gradient = sides[kind]
        matrices = gradient.unflatten(1, (sae.cfg.d_k, sae.cfg.d_v))
        grads[v] = torch.einsum("fkv,frv->frk", matrices, getattr(sae, w))
        grads[w] = torch.einsum("fkv,frk->frv", matrices, getattr(sae, v))
    if sae.cfg.encoder == "dense":
        grads["encoder_matrix"] = g_enc.T
    if sae.cfg.decoder == "flat":
        grads["decoder_matrix"] = g_dec
    return grads


@pytest.mark.parametrize("name", STOCK)
@generated
@given(st.data())
def test_a_step_on_factors_is_saelens_step_on_dense_matrices(name: str, data: st.DataObject) -> None:
    """Losses, reconstructions, codes and gradients, with dead atoms."""
    case = data.draw(cases(name))
    sae = case.sae()
    if hasattr(sae.cfg, "aux_loss_coefficient"):
        sae.cfg.aux_loss_coefficient = 1.0  # SAELens' default
    twin = stock_twin(sae)
    dead = normal(sae.cfg.d_sae, seed=case.seed) < -0.3
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.3)
    ours, stock = (
        each.training_forward_pass(TrainStepInput(case.rows(), coefficients, dead, 0, False)) for each in (sae, twin)
    )
    assert ours.losses.keys() == stock.losses.keys()
    for loss in stock.losses:
        close(ours.losses[loss], stock.losses[loss])
    for field in ("loss", "sae_out", "feature_acts", "hidden_pre"):
        close(getattr(ours, field), getattr(stock, field))
    ours.loss.backward()
    stock.loss.backward()
    expected = chain_rule(sae, twin)
    actual = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys() and sae._built is None
    for n, gradient in expected.items():
        close(actual[n], gradient.to(actual[n].dtype), 1e-9)


# ---- save and load


@each_architecture
@few
@given(st.data())
@torch.no_grad()
def test_what_is_saved_loads_with_the_same_function(name: str, data: st.DataObject) -> None:
    """By SAELens' loaders and by `load_sae`, to the last bit; SAELens' own class has that function, too."""
    case = data.draw(cases(name))
    sae, x = case.sae(), case.rows()
    stock = stock_twin(sae) if name in STOCK else None
    with TemporaryDirectory() as place:
        folder = Path(place)
        sae.save_model(folder / "training")
        again = TrainingSAE.load_from_disk(folder / "training")
        assert type(again) is type(sae) and type(W.load_sae(folder / "training", training=True)) is type(sae)
        assert all(torch.equal(tensor, again.state_dict()[n]) for n, tensor in sae.state_dict().items())
        sae.save_inference_model(folder / "exported")
        exported = SAE.load_from_disk(folder / "exported")
        assert not isinstance(exported, TrainingSAE) and exported.cfg.metadata.training_architecture == name
        exported.save_model(folder / "again")
        for other in ("exported", "again"):
            assert torch.equal(W.load_sae(folder / other)(x), exported(x))
            if case.fields.get("rescale_acts_by_decoder_norm", True):  # else norms must stay, against the defaults
                TrainingSAE.load_from_disk(folder / other)  # training may begin with it
        close(SAE.load_from_disk(folder / "training")(x), exported(x))
        text = (folder / "exported" / "cfg.json").read_text()
        assert "import sae_lens_writesae" in json.loads(text)["metadata"]["requires"]
        assert text == json.dumps(json.loads(text), sort_keys=True)  # so that checksums are those of every process
        if stock is None:
            return
        stock.save_inference_model(folder / "stock")
        for n, each in enumerate((SAE.load_from_disk(folder / "stock"), sae.to_saelens(), exported.to_saelens())):
            each.save_model(folder / f"{n}")
            of_saelens = SAE.load_from_disk(folder / f"{n}")
            assert type(of_saelens).__module__.startswith("sae_lens.")
            assert "requires" not in of_saelens.cfg.metadata
            close(of_saelens.encode(x), exported.encode(x))
            close(of_saelens(x), exported(x))


# ---- fold


@each_architecture
@generated
@given(st.data(), st.booleans())
@torch.no_grad()
def test_folds_leave_the_function_unchanged(name: str, data: st.DataObject, in_training: bool) -> None:
    known = S.TRAINING if in_training or name not in S.INFERENCE else S.INFERENCE
    of_norms = {"rescale_acts_by_decoder_norm": True} if name == "writesae_topk" else {}
    case = data.draw(cases(name, normalize_activations="expected_average_only_in"))
    sae, x, scale = case.sae(known, **of_norms), case.rows(), 2.5
    if hasattr(sae, "encoder_scale"):
        sae.encoder_scale.copy_(normal(sae.cfg.d_sae).abs() + 0.1)
    before = sae(x * scale) / scale
    places = {n: p.data_ptr() for n, p in sae.named_parameters()}
    sae.fold_activation_norm_scaling_factor(scale)
    assert sae.cfg.normalize_activations == "none"
    close(sae(x), before)
    if name == "writesae_matching_pursuit":
        return  # norms have no effect, and SAELens refuses to fold them
    sae.fold_W_dec_norm()
    close(sae(x), before)
    close(sae.decoder_norm(), torch.ones(sae.cfg.d_sae, dtype=torch.float64))
    sae.balance_factors()
    close(sae(x), before)
    for n, parameter in sae.named_parameters():
        assert n == "threshold" or parameter.data_ptr() == places[n]  # SAELens itself moves that one


@each_architecture
@generated
@given(st.data())
@torch.no_grad()
def test_folding_a_metric_keeps_activations_and_reconstructions(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    sae, x = case.sae(), case.rows()
    metric = Metric.of(positive(sae.cfg.d_k), positive(sae.cfg.d_v, 1), scale=2.0, damping=0.05, n_sequences=7)
    moved = metric.apply_rows(x)
    acts, out = sae.encode(moved), sae(moved)
    folded = metric.fold(sae)
    assert type(folded) is type(sae)
    close(folded.encode(x), acts, 1e-9)
    close(metric.apply_rows(folded(x)), out, 1e-9)
    close(sae.encode(moved), acts, 1e-9)
    assert (folded.cfg.metadata.metric, sae.cfg.metadata.metric) == ("gauss_newton", None)


# ---- losses = their definitions


@pytest.mark.parametrize("loss", ["reads", "write"])
@each_architecture
@generated
@given(st.data())
def test_a_step_mixes_the_loss_in_by_its_weight(name: str, loss: str, data: st.DataObject) -> None:
    """`reads`: |E^T q|^2 K / mean |q|^2. `write`: the variance of the batch times the misalignment of contributions."""
    case = data.draw(cases(name, loss=loss, loss_weight=0.3))
    x, K, V = case.rows(), case.fields["d_k"], case.fields["d_v"]
    columns = normal(len(x), K if loss == "reads" else K * V, seed=case.seed + 2)
    plain = train_step(case.sae(loss="mse"), x)
    sae = case.sae()
    output = train_step(sae, torch.cat([x, columns], 1))
    assert torch.equal(output.sae_in, x) and torch.equal(output.sae_out, plain.sae_out)
    if loss == "reads":
        error = (output.sae_out - x).unflatten(1, (K, V))
        read = torch.einsum("nkv,nk->nv", error, columns)
        direct = read.square().sum(1).mean() * K / columns.square().sum(1).mean()
    else:
        contribution = sae.coefficients(output.feature_acts.to_dense()) * sae.W_dec.norm(dim=1)
        shares = contribution / contribution.sum(1, keepdim=True).clamp_min(1e-30)
        cosines = cosine_similarity(columns[:, None], sae.W_dec, dim=-1)
        direct = (x - x.mean(0)).square().sum(1).mean() * (1 - (shares * cosines).sum(1)).mean()
    close(output.losses[f"{loss}_loss"], direct)
    close(output.loss, plain.loss + 0.3 * (direct - output.losses["mse_loss"]))


# ---- planted atoms are found


@each_architecture
def test_planted_atoms_are_found(name: str) -> None:
    data = Planted(mean=0.2)
    assert recovery(trained(name, data), data) > 0.9
    assert recovery(untrained(name), data) < 0.65  # what chance gives


@pytest.mark.parametrize("name", sorted(S.TRAINING.keys() - {"writesae_matching_pursuit"}))  # codes follow b_dec there
def test_any_trainer_leaves_reconstructions_right_on_average(name: str, tmp_path: Path) -> None:
    """Of the dictionary that is returned, of its checkpoint and of its export. Codes stay as they are."""
    penalties: dict[str, dict[str, Any]] = {
        "writesae_standard": {"l1_coefficient": 3e-3},
        "writesae_gated": {"l1_coefficient": 3e-3},
        "writesae_jumprelu": {"l0_coefficient": 1e-5, "jumprelu_init_threshold": 0.01},
    }
    data = SmallWrites()
    sae = trained(name, data, 150, 3e-3, d_sae=36, **penalties.get(name, {})).requires_grad_(False)
    x = torch.cat([next(data) for _ in range(60)])
    codes, rebuilt = sae.encode(x), sae(x)

    def mean_error(reconstructions: Tensor) -> float:
        """Squared norm of the mean residual, as a share of that of the inputs."""
        return float((x - reconstructions).mean(0).square().sum() / x.square().sum(1).mean())

    by_optimizer = mean_error(sae.coefficients(codes) @ sae.W_dec + sae.b_dec)
    sae.save_model(tmp_path / "checkpoint")
    checkpoint: Any = TrainingSAE.load_from_disk(tmp_path / "checkpoint").requires_grad_(False)
    assert torch.equal(checkpoint(x), rebuilt)
    sae.save_inference_model(tmp_path / "exported")
    exported = W.load_sae(tmp_path / "exported")(x)
    assert max(mean_error(rebuilt), mean_error(exported)) < min(1e-3, 0.6 * by_optimizer)
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-3, atol=1e-5)
    assert mean_error(sae.coefficients(codes) @ sae.W_dec + sae.b_dec) == pytest.approx(mean_error(rebuilt), rel=0.01)
