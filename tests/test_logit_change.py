"""Logit change: formulas exact where they should be, F2's error of second order in every family, honest scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MAKERS, VOCAB, KeepFloat64, make_hf
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit, embedded
from hookpoints.recurrence import FORMS, random_recurrence
from sae_lens_writesae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.firings import collect_firings
from sae_lens_writesae.logit_change import LogitChange, LogitChangeConfig, run_logit_change
from sae_lens_writesae.logit_change.config import rank_name
from sae_lens_writesae.logit_change.predictors import Predictions, ReadGradients, predict, read_weights

T = 24
SMALL = LogitChangeConfig(
    n_atoms=3, firings_per_atom=2, horizons=(0, 3), ranks=((1, 1), (2, 5)), eps=(1e-5, 1e-4), first_position=4
)


@pytest.fixture
def _keep_float64() -> Iterator[None]:
    with KeepFloat64():
        yield


float64 = pytest.mark.usefixtures("_keep_float64")

#: What float32 inside upstream's KDA models leaves of float64.
NOISE = {"kimi_linear": 3e-9, "bailing_hybrid": 3e-9}


@lru_cache(maxsize=4)
def tiny(kind: str, seed: int = 0) -> Any:
    """A tiny hooked float64 model."""
    hf = make_hf(kind, seed).double()
    hf.set_experts_implementation("eager")  # grouped products know no float64
    return HookedRecurrent.from_hf(hf, backend="recurrence")


def some_tokens(n: int = 3, length: int = T) -> Tensor:
    return torch.randint(1, VOCAB, (n, length), generator=torch.Generator().manual_seed(1))


def make_sae(model: Any, layer: int | None = None, *, rank: int = 1, **metadata: Any) -> Any:
    """Untrained: its atoms are random, which is all that plumbing needs."""
    layer = model.cfg.recurrent_layers[0] if layer is None else layer
    shape = model.cfg.layer(layer)
    torch.manual_seed(0)
    hook = metadata.pop("hook_name", f"blocks.{layer}.mixer.heads.{shape.H - 1}.hook_write_vec")
    sizes = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_sae": 24, "k": 3, "rank": rank} | metadata
    return WriteTopKSAE(WriteTopKSAEConfig(**sizes, metadata=SAEMetadata(hook_name=hook)))


def changed(**fields: Any) -> LogitChangeConfig:
    return LogitChangeConfig(**SMALL.to_dict() | fields)


def run(model: Any, sae: Any, tokens: Tensor | None = None, config: LogitChangeConfig = SMALL) -> LogitChange:
    return run_logit_change(model, sae, some_tokens() if tokens is None else tokens, config, progress=False)


class Case:
    """One matrix of rank 2 added to one head at one token, and one logit later."""

    start, position, token = 7, 19, 5

    def __init__(self, model: Any, layer: int | None = None):
        self.model = model
        self.layer = model.cfg.recurrent_layers[0] if layer is None else layer
        shape = model.cfg.layer(self.layer)
        self.head = shape.H - 1
        self.session = model.edit_session(some_tokens(1))
        whole = self.session.recurrence(self.layer)
        self.recurrence = whole.select(heads=slice(self.head, self.head + 1))
        generator = torch.Generator().manual_seed(2)
        keys = torch.randn(1, 2, shape.K, generator=generator, dtype=torch.float64)
        values = torch.randn(1, 2, shape.V, generator=generator, dtype=torch.float64)
        unit = self.recurrence.k[0, self.start, 0].norm() * self.recurrence.u[0, self.start, 0].norm()
        self.added = Factors(keys, values * unit / (keys.mT @ values).norm())
        self.direction = torch.zeros(VOCAB, dtype=torch.float64).index_fill_(0, torch.tensor(self.token), 1.0)

    @torch.no_grad()
    def predicted(self) -> Predictions:
        gradients = ReadGradients(self.model, self.session, self.layer, self.head, [self.position, self.start])
        found = [gradients.at(self.position, self.direction)]
        naive = self.model.W_O(self.layer, self.head) @ self.model.W_U @ self.direction
        return predict(self.recurrence, self.added, self.start, found, naive[None])[0]

    def measured(self, eps: float) -> float:
        place = (self.layer, self.head, self.start)
        rows = [[WriteEdit(*place, self.added.keys[0], eps * self.added.values[0])], []]
        edited, plain = self.session.run(rows, stop=self.position + 1).logits[:, -1, self.token]
        return float(edited - plain)


# -- the formulas


@float64
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_the_error_of_f2_falls_as_eps_squared(kind: str) -> None:
    case = Case(tiny(kind))
    slope = float(case.predicted().F2)
    sizes = 10.0 ** -np.arange(0, 6.1, 0.5)
    changes = np.array([case.measured(eps) for eps in sizes])
    errors = np.abs(changes - sizes * slope)
    clear = np.flatnonzero(errors > NOISE.get(kind, 1e-11))
    assert len(clear) >= 3 and clear[-1] == len(clear) - 1
    small, large = clear[-1], clear[-3]
    assert np.log10(errors[large] / errors[small]) / np.log10(sizes[large] / sizes[small]) == pytest.approx(2, abs=0.1)
    assert errors[small] < 0.05 * abs(changes[small])


@float64
@pytest.mark.parametrize("kind", ["qwen3_5", "olmo_hybrid", "kimi_linear", "mamba2", "falcon_h1"])
def test_f2_is_the_gradient_at_the_write(kind: str) -> None:
    """Another road to the same derivative: autograd at hook_write, through the recurrence itself."""
    case, kept = Case(tiny(kind)), []
    name = f"blocks.{case.layer}.mixer.heads.{case.head}.hook_write"
    logits = case.model.run_with_hooks(case.session.tokens, fwd_hooks=[(name, lambda value, hook: kept.append(value))])
    (gradient,) = torch.autograd.grad(logits[0, case.position, case.token], kept[0])
    expected = (gradient[0, case.start] * case.added.dense()[0]).sum()
    assert abs(expected) > 1e-8
    assert_close(case.predicted().F2[0], expected, rtol=1e-8, atol=1e-14)


def silence(model: Any, *names: str) -> None:
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if name.endswith(names):
                parameter.zero_()


@float64
@pytest.mark.parametrize(
    ("kind", "layer", "silent"),
    [
        ("mamba2", 2, ()),
        ("qwen3_5", 2, ("3.self_attn.o_proj.weight", "2.mlp.down_proj.weight", "3.mlp.down_proj.weight")),
        ("olmo_hybrid", 2, ("3.self_attn.o_proj.weight", "2.mlp.down_proj.weight", "3.mlp.down_proj.weight")),
        ("falcon_h1", 2, ("2.feed_forward.down_proj.weight",)),
        ("granitemoehybrid", 2, ("2.shared_mlp.output_linear.weight",)),
    ],
)
def test_f1_is_exact_where_there_is_only_the_direct_path(kind: str, layer: int, silent: tuple[str, ...]) -> None:
    """Nothing comes after the mixer but the final norm; residual multipliers and post-norms included."""
    model = tiny(kind, seed=3)
    silence(model, *silent)
    found = Case(model, layer).predicted()
    assert float(found.F2) != 0
    assert_close(found.F1, found.F2, rtol=1e-9, atol=0)


@float64
@pytest.mark.parametrize("kind", ["qwen3_5", "mamba2", "kimi_linear"])
def test_f0_is_the_papers_formula(kind: str) -> None:
    """Decay per head, or per key channel inside the inner product, step by step."""
    case = Case(tiny(kind))
    r, expected = case.recurrence, 0.0
    alpha = torch.ones(r.K, dtype=torch.float64)
    for t in range(case.start + 1, case.position + 1):
        alpha = alpha * r.log_decay[0, t, 0].exp()
    out = (case.model.W_O(case.layer, case.head) @ case.model.W_U[:, case.token]).detach()
    for key, value in zip(case.added.keys[0], case.added.values[0]):
        expected += float((alpha * key) @ r.q[0, case.position, 0] * r.scale * (value @ out))
    assert float(case.predicted().F0) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_read_weights_are_the_linear_response(form: str) -> None:
    """Including reads before the write (RWKV-6), K != V."""
    start, r = 3, random_recurrence(form, T=11, H=1, K=6, V=4, dtype=torch.float64)
    key, value = torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    keys, values = torch.zeros(1, r.T, 1, 6).double(), torch.zeros(1, r.T, 1, 4).double()
    keys[0, start, 0], values[0, start, 0] = key, value
    response = r.with_write(keys, values).outputs()[0, start:, 0]
    weights = read_weights(r, key[None, None], start, r.T)
    assert_close(weights[0, 0, :, None] * value, response, rtol=1e-10, atol=1e-13)
    assert_close(read_weights(r, key[None, None], start, 7)[0, 0], weights[0, 0, :4], rtol=1e-10, atol=1e-13)


# -- the evaluation


@pytest.fixture(scope="module")
def result() -> LogitChange:
    with KeepFloat64():
        model = tiny("mamba2")
        return run(model, make_sae(model))


@float64
@pytest.mark.parametrize(("kind", "eps"), [("qwen3_5", 1e-5), ("mamba2", 1e-3), ("kimi_linear", 1e-2)])
def test_small_edits_are_predicted_and_what_is_left_is_curvature(kind: str, eps: float) -> None:
    model = tiny(kind)
    found = run(model, make_sae(model, rank=2), config=changed(eps=(eps, 3 * eps)))
    assert found.score("F2", eps=eps)["r2"] > 0.999 and found.score("F2", quantity="log_prob", eps=eps)["r2"] > 0.999
    assert found.order().exponent == pytest.approx(2, abs=0.2)
    (claim,) = [claim for claim in found.claims() if "F2" in claim.claim]
    assert claim.outcome == "holds", claim


@float64
def test_rows_equal_full_forwards_with_the_write_changed_by_hand(result: LogitChange) -> None:
    model = tiny("mamba2")
    sae, tokens = make_sae(model), some_tokens()
    layer = model.cfg.recurrent_layers[0]
    head = model.cfg.layer(layer).H - 1
    rows = result.tables["cells"].query("eps == 1e-4")
    assert (
        set(rows["rank"]) == {"1", "2-5"}
        and set(rows["horizon"]) == {0, 3}
        and len(rows) == 2 * 2 * 2 * result.info["n_firings"]
    )
    for row in rows.itertuples():
        sequence = tokens[row.sequence][None]
        with torch.no_grad():
            plain = model(sequence)[0]
            write = model.recurrence(sequence, layer).write(head)[0, row.position, 0]
            atom = sae.W_dec[row.atom].detach().double().view_as(write)
            edit = row.eps * write.norm() * atom / atom.norm()

            def hook(writes: Tensor, hook: Any, row: Any = row, edit: Tensor = edit) -> Tensor:
                writes = writes.clone()
                writes[0, row.position] += edit
                return writes

            name = f"blocks.{layer}.mixer.heads.{head}.hook_write"
            edited = model.run_with_hooks(sequence, fwd_hooks=[(name, hook)])[0]
        assert row.unit == pytest.approx(float(write.norm()), rel=1e-6)
        at = row.position + row.horizon
        if row.quantity == "log_prob":
            plain, edited = plain.log_softmax(-1), edited.log_softmax(-1)
        assert row.measured == pytest.approx(float(edited[at, row.token] - plain[at, row.token]), rel=1e-4, abs=1e-12)
        assert row.native_rank == 1 + int((plain[at] > plain[at, row.token]).sum())
        low, high = (1, 1) if row.rank == "1" else (2, 5)
        assert low <= row.native_rank <= high


@float64
def test_batches_and_repeats_change_nothing(result: LogitChange) -> None:
    model = tiny("mamba2")
    again = run(model, make_sae(model), config=changed(rows_per_run=2)).tables["cells"]
    pd.testing.assert_frame_equal(again, result.tables["cells"], rtol=1e-5, atol=1e-13)
    other = run(model, make_sae(model), config=changed(seed=1)).tables["cells"]
    assert not other[["atom", "position"]].equals(again[["atom", "position"]])


@float64
def test_nothing_is_left_behind_and_inference_mode_is_no_obstacle(result: LogitChange) -> None:
    model, tokens = tiny("mamba2"), some_tokens()
    with torch.no_grad():
        before = model(tokens)
    with torch.inference_mode():
        again = run(model, make_sae(model), tokens.clone())
    pd.testing.assert_frame_equal(again.tables["cells"], result.tables["cells"])
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert not any(len(point.fwd_hooks) for point in model.hook_dict.values())


@float64
def test_the_coefficient_as_unit(result: LogitChange) -> None:
    model = tiny("mamba2")
    sae, tokens = make_sae(model), some_tokens()
    found = run(model, sae, config=changed(unit="coefficient")).tables["cells"]
    firings = collect_firings(model, sae, tokens).frame().set_index(["sequence", "position", "atom"])["activation"]
    for row in found.drop_duplicates("firing").itertuples():
        size = firings[row.sequence, row.position, row.atom] * float(sae.W_dec[row.atom].detach().norm())
        assert row.unit == pytest.approx(size, rel=1e-5)
    assert "own coefficient" in run(model, sae, config=changed(unit="coefficient")).notes()[0]


def test_save_load_figures_and_notes(result: LogitChange, tmp_path: Any) -> None:
    back = LogitChange.load(result.save(tmp_path / "x"))
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(back.tables[name], table)
        assert table.notna().all(axis=None) and list(result.COLUMNS[name]) == [
            column for column in result.COLUMNS[name] if column in table
        ]
    assert back.claims() == result.claims() and back.notes() == result.notes()
    svgs = [figure.svg for figure in back.figures()]
    assert len(svgs) == 6 and len(set(svgs)) == 6 and all(svg.startswith("<svg") for svg in svgs)
    assert any("not centred" in note for note in back.notes())
    with pytest.raises(KeyError, match="there are"):
        back.score("F2", eps=7)


def test_mamba2_is_set_beside_the_papers_number(result: LogitChange) -> None:
    (claim,) = [claim for claim in result.claims() if claim.number == 7]
    assert "the paper reports -0.07" in claim.measured and claim.n == 4 * result.info["n_firings"]


def test_held_out_positions_of_the_embedded_model() -> None:
    model = HookedRecurrent.from_pretrained("embedded", device="cpu")
    ids = model.to_tokens(embedded.text("test")[:3000])[0]
    config = LogitChangeConfig(n_atoms=6, firings_per_atom=1, eps=(0.1, 0.3))
    found = run(model, make_sae(model, 2), ids[: 6 * 40].view(6, 40), config)
    for horizon in config.horizons:
        assert found.score("F2", horizon=horizon, eps=0.1)["r2"] > 0.95
    assert found.score("F0", eps=0.1)["r2"] < 0.5 < found.per_cell("shuffled")["median_r2"]
    assert found.info["floor"] < 1e-4 and found.info["seconds"] > 0


# -- bad input


@float64
def test_bad_input() -> None:
    model = tiny("mamba2")
    sae = make_sae(model)
    with pytest.raises(ValueError, match="T >= 8"):
        run(model, sae, some_tokens(length=7))
    with pytest.raises(ValueError, match="two or more sequences"):
        run(model, sae, some_tokens(1))
    with pytest.raises(ValueError, match="vocabulary has 64 tokens"):
        run(model, sae, config=changed(ranks=(1, (60, 65))))
    with pytest.raises(ValueError, match="cannot be tested"):
        run(model, sae, config=changed(atoms=(999,)))
    with pytest.raises(ValueError, match=r"8 x 16 = 128"):
        run(model, make_sae(model, d_in=64, d_k=8))
    with pytest.raises(Exception, match="no hook named"):
        run(model, make_sae(model, hook_name="blocks.9.mixer.heads.0.hook_write_vec"))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="0 of 24 fire"):
        run(model, sae)


@float64
def test_writes_of_zero_have_no_unit() -> None:
    model = tiny("qwen3_5", seed=5)
    silence(model, "linear_attn.in_proj_qkv.weight")
    sae = make_sae(model)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
    with pytest.raises(ValueError, match=r"[1-9] \(the native write is zero"):
        run(model, sae)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eps": (0.1,)}, "two or more sizes"),
        ({"eps": (0.0, 1.0)}, "above 0"),
        ({"horizons": (-1,)}, "from 0 on"),
        ({"horizons": ()}, "horizons is empty"),
        ({"horizons": (1, 1)}, "named once"),
        ({"ranks": ((3, 2),)}, "pairs 1 <= lowest"),
        ({"unit": "parsec"}, "write, coefficient"),
        ({"n_atoms": 0}, "at least 1"),
    ],
)
def test_bad_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogitChangeConfig(**fields)


def test_settings_survive_json() -> None:
    config = LogitChangeConfig(horizons=[4, 0], ranks=[1, [2, 5]], eps=[3, 1], atoms=[2, 1])  # pyright: ignore
    assert config.horizons == (0, 4) and config.ranks == ((1, 1), (2, 5)) and config.eps == (1.0, 3.0)
    assert [rank_name(group) for group in config.ranks] == ["1", "2-5"] and config.atoms == (1, 2)
    assert LogitChangeConfig(**config.to_dict()) == config
