"""Run a tiny random model of every family, here and by an oracle: what ``families_table.py`` makes its page of.

Needs tests/ on the path, where the models are.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import MAKERS, VOCAB, KeepFloat64, make_hf
from families_oracles import oracle_of
from families_page import Facts, Family
from torch import Tensor, nn

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.fla import MODEL_TYPES as FLA_TYPES
from hookpoints.hooks.table import rows
from hookpoints.layer.call import LayerCall
from hookpoints.rules import Arguments, Op, OpResult, Rule


@dataclass(frozen=True)
class ModelType:
    """A model type and its maker of tiny models."""

    source: str
    """Who defines the model: transformers, fla or hookpoints."""
    name: str

    def make(self) -> nn.Module:
        """A tiny random model."""
        if self.source == "fla":
            from fla_models import make_fla

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what fla's layers advise about their settings
                return make_fla(self.name)
        if self.source == "hookpoints":
            return make_hf(self.name, value_dim=32)  # K = V: the oracle knows no other
        model = make_hf(self.name)
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        return model


def model_types() -> list[ModelType]:
    """All that hookpoints hooks."""
    own = [ModelType("hookpoints" if name == "rwkv7" else "transformers", name) for name in MAKERS]
    return own + [ModelType("fla", name) for name in sorted(FLA_TYPES)]


class Call(NamedTuple):
    """One op call of a layer."""

    rule: Rule
    op: Op
    arguments: Arguments

    def copied(self) -> Arguments:
        """The arguments, free to be written into."""
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.arguments.items()}

    def recurrence(self) -> Recurrence:
        """The canonical form."""
        return Recurrence.of(self.rule.form(self.rule.factors(self.arguments), self.arguments))


def tokens() -> Tensor:
    """[2,70]: more than one chunk, not a multiple of one."""
    return torch.randint(1, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def calls_of(model_type: ModelType) -> list[Call]:
    """Every op call of one pass in float64."""
    calls: list[Call] = []
    with KeepFloat64():
        model = HookedRecurrent.from_hf(model_type.make().double(), backend="recurrence", self_check=False)

        native = LayerCall.handle

        def record(layer: LayerCall, op: Op, arguments: Arguments) -> object:
            calls.append(call := Call(layer.mixer.rule, op, arguments))
            calls[-1] = call._replace(arguments=call.copied())
            return native(layer, op, arguments)

        with _handled_by(record):
            model(tokens())
    return calls


def facts_of(call: Call) -> Facts:
    """What a call of a model's op tells of its family."""
    with KeepFloat64():
        factors, r = call.rule.factors(call.arguments), call.recurrence()
    return Facts(
        rule=call.rule.name,
        state=_symbols(call.rule),
        rank=call.rule.rank,
        erase=_erase(r, factors.k),
        decay=_decay(r),
        read="before the write" if r.read_before_write else "after the write",
        hooks=[row.name for row in rows("mixer") if row.factor in call.rule.factor_names],
    )


@torch.no_grad()
def measure(model_type: ModelType, kernels: Path | None) -> Family:
    """One model type's row. ``kernels``: folder that tests/oracles/fla_interpreted.py filled."""
    calls = calls_of(model_type)
    with KeepFloat64():
        op_error = max(map(_op_error, calls))
    native = _native_logits(model_type)
    logits = HookedRecurrent.from_hf(model_type.make(), backend="recurrence")(tokens())
    r = calls[0].recurrence()
    return Family(
        model_type=model_type.name,
        source=model_type.source,
        facts=facts_of(calls[0]),
        sizes=f"{r.H}, {r.K}, {r.V}",
        op_oracle=oracle_of(calls[0].rule, calls[0].op).name,
        op_error=op_error,
        logits_oracle=native.oracle,
        logits_error=_largest(logits - native.logits),
        largest_logit=_largest(native.logits),
        kernels_error=_kernels_error(model_type.name, kernels) if model_type.source == "fla" else None,
    )


class _Native(NamedTuple):
    logits: Tensor
    """[B,T,vocab], float32."""
    oracle: str


def _native_logits(model_type: ModelType) -> _Native:
    """The model without hookpoints' recurrence: as upstream runs it on a CPU, or by another package; fla's, which do
    not run on a CPU, with each op call answered by its oracle."""
    model: Any = model_type.make()
    if model_type.source == "transformers":
        return _Native(model(tokens()).logits, "transformers' torch op")
    if model_type.source == "hookpoints":
        from rwkv7_oracles import ask_rwkv7_hf

        with tempfile.TemporaryDirectory() as folder:
            logits = [ask_rwkv7_hf(model, row[None], Path(folder)).logits for row in tokens()]
        return _Native(torch.stack(logits), "rwkv7-hf")
    names = set()

    def answer(layer: LayerCall, op: Op, arguments: Arguments) -> object:
        oracle = oracle_of(layer.mixer.rule, op)
        names.add(oracle.name)
        return layer.mixer.rule.write_result(oracle.answer(arguments), arguments)

    hooked = HookedRecurrent.from_hf(model)
    with _handled_by(answer):
        logits = hooked(tokens())
    return _Native(logits, names.pop())


@contextmanager
def _handled_by(handle: Callable[[LayerCall, Op, Arguments], object]) -> Iterator[None]:
    """Let ``handle(layer, op, arguments)`` have the op calls of all layers."""
    native = LayerCall.handle
    LayerCall.handle = lambda layer, op, arguments: handle(layer, op, arguments)
    try:
        yield
    finally:
        LayerCall.handle = native


def _op_error(call: Call) -> float:
    expected: OpResult = oracle_of(call.rule, call.op).answer(call.copied())
    scanned = call.recurrence().scan()
    pairs = [(scanned.outputs, expected.outputs), (scanned.final_state, expected.final_state)]
    return max(_largest(ours - theirs) / _largest(theirs) for ours, theirs in pairs if theirs is not None)


def _kernels_error(name: str, folder: Path | None) -> float | None:
    if folder is None or not (folder / f"{name}.safetensors").exists():
        return None
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "oracles"))
    from compare import errors_of

    return max(errors.outputs for errors in errors_of(name, folder).values())


def _erase(r: Recurrence, key: Tensor) -> str:
    """a b^T, told from the factors. ``key``: what ``hook_k`` sees."""
    if r.b is None:
        return "none"
    if r.beta is None:
        return "its own a, b"
    if torch.allclose(r.b, key):
        return "−β k kᵀ"
    alpha = r.log_decay.exp() if r.log_decay is not None else torch.ones(r.B, r.T, r.H)
    alpha = alpha if alpha.ndim == 4 else alpha.unsqueeze(-1)
    return "−β k (αk)ᵀ" if torch.allclose(r.b, key * (alpha if key.ndim == 4 else alpha.unsqueeze(-2))) else "−β k pᵀ"


def _decay(r: Recurrence) -> str:
    """The decay in words."""
    if r.log_decay is None:
        return "none"
    kind = "one per head" if r.log_decay.ndim == 3 else "one per key channel"
    return kind + (", constant" if torch.equal(r.log_decay, r.log_decay[:, :1].expand_as(r.log_decay)) else "")


class _Names:
    """Stands in for a mixer and gives the name of whatever it is asked for."""

    def __getattr__(self, name: str) -> str:
        return name


def _symbols(rule: Rule) -> str:
    """What a rule's layers call the sides of the state: ``head_k_dim × head_v_dim``."""
    _, key, value = rule.head_shape(_Names())  # type: ignore[arg-type]
    return f"{key} × {value}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
