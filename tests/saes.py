"""Dictionaries of one head of a tiny model: with chosen atoms, random ones, writes as atoms, exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import TRAINING, WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.sae.target import HeadHook

LAYER, HEAD, K, V = 1, 2, 8, 6
HOOK = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write_vec"
STATE = HOOK.replace("write", "state")


@torch.no_grad()
def sae_of(
    hook: str,
    model: str | None,
    atoms: LowRank,
    k: int,
    *,
    flat: bool = False,
    **cfg: object,
) -> WriteTopKSAE:
    """At each token the k atoms with the largest inner products with what the hook carries, if these are positive.

    Args:
        atoms: F matrices of rank R, as they are written at activation 1.
        flat: keep the same atoms as dense matrices (a FlatSAE).
        cfg: more fields of the config.
    """
    kinds = {"encoder": "dense", "decoder": "flat"} if flat else {"rank": atoms.rank}
    d_k, d_v = atoms.keys.shape[-1], atoms.values.shape[-1]
    meta = SAEMetadata(hook_name=hook, model_name=model)
    sizes = {"d_in": d_k * d_v, "d_k": d_k, "d_sae": len(atoms), "k": k}
    sae = WriteTopKSAE(WriteTopKSAEConfig(**sizes | kinds | cfg, metadata=meta))  # pyright: ignore[reportArgumentType]
    sae = sae.to(atoms.keys.dtype)
    factors = {"v": atoms.keys, "w": atoms.values, "v_enc": atoms.keys, "w_enc": atoms.values}
    if flat:
        factors = {"decoder_matrix": atoms.dense().flatten(1), "encoder_matrix": atoms.dense().flatten(1).T}
    for name in factors.keys() & dict(sae.named_parameters()).keys():  # a tied encoder has no factors of its own
        getattr(sae, name).copy_(factors[name])
    return sae


def tied_sae(
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    target: str = "write",
    layer: int = LAYER,
    head: int = HEAD,
    bias: float = 0,
) -> Any:
    """Tied atoms keys [F,K] values [F,V]^T: activation i is <A_i, X> + bias where that is positive and among the k
    largest."""
    hook = f"blocks.{layer}.mixer.heads.{head}.hook_{target}_vec"
    sae = sae_of(hook, None, LowRank.rank_one(keys, values), k, rescale_acts_by_decoder_norm=False)
    with torch.no_grad():
        sae.b_enc.fill_(bias)
    return sae


def random_sae(model: Any, d_sae: int = 12, k: int = 3, **place: Any) -> Any:
    """Atoms of random directions, as those of an untrained dictionary."""
    shape = model.cfg.layer(place.get("layer", LAYER))
    drawn = torch.Generator().manual_seed(0)
    sides = [torch.randn(d_sae, n, generator=drawn, dtype=torch.float64) for n in (shape.K, shape.V)]
    keys, values = (torch.nn.functional.normalize(side, dim=1).to(model.cfg.dtype) for side in sides)
    return tied_sae(keys, values, k, **place)


def native_writes(model: Any, tokens: Tensor, layer: int = LAYER, head: int = HEAD) -> tuple[Tensor, Tensor]:
    """Keys [T,K] and values [T,V] of what the head writes on one sequence [1,T]."""
    with torch.no_grad():
        recurrence = model.recurrence(tokens, layer)
    return recurrence.k[0, :, head], recurrence.u[0, :, head]


def one_atom_a_position(model: Any, tokens: Tensor, **place: Any) -> Any:
    """Atom t is the direction of the write at t of `tokens` [1,T]; with k = 1 it fires there alone (no other direction
    has a larger product with that write), with the norm of the write as its activation."""
    sides = native_writes(model, tokens)
    return tied_sae(*(torch.nn.functional.normalize(side, dim=1) for side in sides), 1, **place)


def logits_with_write(model: Any, tokens: Tensor, change: Any, layer: int = LAYER, head: int = HEAD) -> Tensor:
    """Logits [T,vocab] of a full pass over `tokens` [1,T] in which the head's writes [T,K,V] are `change` of them."""

    def hook(writes: Tensor, hook: Any) -> Tensor:
        return change(writes[0].clone())[None]

    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.mixer.heads.{head}.hook_write", hook)]):
        return model(tokens)[0]


def random_low_rank(rank: int, seed: int, n: int = 6, k: int = 5, v: int = 7) -> LowRank:
    """n matrices K x V in float64, of terms with Gaussian sides."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(n, rank, size, generator=g, dtype=torch.float64) for size in (k, v))
    return LowRank(keys, values)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train_step(sae: Any, batch: Tensor | LowRank, at: int = 1, dead: Tensor | None = None) -> Any:
    """What a step in training gives, on matrices [N,K*V] or writes; SAELens counts steps from 0."""
    rows = batch.dense().flatten(1) if isinstance(batch, LowRank) else batch
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.1)
    return sae.training_forward_pass(TrainStepInput(rows, coefficients, dead, at, False))


def runner_config(sae: Any, steps: int, batch: int, **fields: Any) -> Any:
    """Of a short run that leaves nothing on the disk."""
    quiet = {"logger": LoggingConfig(log_to_wandb=False), "checkpoint_path": None, "verbose": False}
    sizes = {"training_tokens": steps * batch, "train_batch_size_tokens": batch, "lr": 1e-2, "device": "cpu"}
    return LanguageModelSAERunnerConfig(sae=sae, **quiet | sizes | fields)


class Steps:
    """Counts the steps of the optimizer. That with the number `stop` is not `taken`, but raises, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken, self.stop = 0, -1
        step = torch.optim.Adam.step

        def counted(*arguments: Any) -> Any:
            if self.taken == self.stop:
                self.stop = -1
                raise InterruptedError
            self.taken += 1
            return step(*arguments)

        monkeypatch.setattr(torch.optim.Adam, "step", counted)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def untrained_sae(name: str, known: Any = TRAINING, *, k: int = 4, seed: int = 0, **fields: Any) -> Any:
    """An untrained SAE of an architecture, with k, and with its widths, where it needs them."""
    torch.manual_seed(seed)
    sae_class, config_class = known[name]
    own = {"k": k, "matryoshka_widths": [fields["d_sae"] // 2, fields["d_sae"]]}
    needed = {field: value for field, value in own.items() if field in config_class.__dataclass_fields__}
    return sae_class(config_class(**needed | fields))


def drawn_sae(name: str, known: Any = TRAINING, **fields: Any) -> Any:
    """An SAE of an architecture whose parameters are all drawn, with no upkeep that SAELens does not have."""
    plain = {"unit_norm_every": 0, "resample_every": 0, "b_dec_init": "zeros"} if known is TRAINING else {}
    sae = untrained_sae(name, known, **plain | fields)
    for parameter in sae.parameters():
        parameter.data.copy_(0.6 * torch.randn_like(parameter))
    if hasattr(sae, "threshold"):  # it is positive
        sae.threshold.data.abs_()
    return sae


def native_and_edited(model: Any, tokens: Tensor, change: Any, at: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [T,vocab] without a change and with one: of the writes [T,K,V], or of the write [K,V] at one token."""

    def of_one(writes: Tensor) -> Tensor:
        writes[at] = change(writes[at])
        return writes

    changes = (lambda writes: writes, change if at is None else of_one)
    native, edited = (logits_with_write(model, tokens, each) for each in changes)
    return native, edited


def muted(model: Any, until: int) -> Any:
    """In this scope all heads of the layer have values of zero before that token."""

    def mute(value: Tensor, hook: Any) -> Tensor:
        return torch.cat([torch.zeros_like(value[:, :until]), value[:, until:]], 1)

    return model.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_v", mute)])


def make_sae(
    model: Any, decoder: str = "rank", rank: int = 1, d_sae: int = 30, hook: str = HOOK, seed: int = 0, **fields: Any
) -> Any:
    """An untrained dictionary of the head that the hook names; at each token three atoms fire."""
    torch.manual_seed(seed)
    shape = model.cfg.layer(HeadHook.parse(hook).layer)
    sizes = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_sae": d_sae, "k": 3, "rank": rank, "decoder": decoder}
    meta = SAEMetadata(hook_name=hook, model_name=model.cfg.model_name)
    return WriteTopKSAE(WriteTopKSAEConfig(**sizes | fields, metadata=meta))


def planted(model: Any, tokens: Any) -> Any:
    """Atoms are native writes of the first sequence, encoder = decoder: each fires at its own write at the latest."""
    at = torch.linspace(1, tokens.shape[1] - 1, 30).long()
    keys, values = (side[at] for side in native_writes(model, tokens[:1]))
    atoms = LowRank.rank_one(keys, torch.nn.functional.normalize(values, dim=-1))
    return sae_of(HOOK, model.cfg.model_name, atoms, 3)


def exact_sae(hook: str = HOOK, model_name: str = "", k: int = K, v: int = V, **metadata: Any) -> Any:
    """Atoms +e_i and -e_i of every entry: reproduces any matrix."""
    d_in = k * v
    shape = {"d_in": d_in, "d_k": k, "d_sae": 2 * d_in, "k": d_in, "encoder": "dense", "decoder": "flat"}
    sae = WriteTopKSAE(
        WriteTopKSAEConfig(**shape, metadata=SAEMetadata(hook_name=hook, model_name=model_name, **metadata))
    )
    basis = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    sae.decoder_matrix.data, sae.encoder_matrix.data = basis, basis.T.contiguous()
    return sae


def positive(size: int, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues over two orders of magnitude."""
    vectors = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return vectors @ torch.logspace(-1, 1, size, dtype=torch.float64).diag() @ vectors.mT
