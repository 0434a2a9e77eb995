"""Every public call that takes any keyword refuses one that nothing reads, and a filter that matches nothing raises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from saes import make_sae
from tiny_models import MAKERS
from torch import Tensor

import hookpoints
import sae_lens_writesae
import writesae
from hookpoints import HookedRecurrent, UnknownHookError, WriteEdit, attach
from hookpoints.errors import InputError
from hookpoints.model import loading
from hookpoints.model.attach import Attached
from sae_lens_writesae import HookedSAERecurrent

HOOK = "blocks.1.hook_resid_pre"


def takes_any_name(call: object) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no function, or one of C
        return False
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def public(module: ModuleType) -> list[str]:
    """Functions, classes ("NAME"), and methods ("NAME.METHOD") that take any keyword."""
    calls = []
    for name in module.__all__:
        value = getattr(module, name)
        calls += [name] if takes_any_name(value) and not inspect.isabstract(value) else []
        methods = [method for method in dir(value) if inspect.isclass(value) and not method.startswith("_")]
        calls += [f"{name}.{method}" for method in methods if takes_any_name(getattr(value, method))]
    return calls


CALLS = [name for module in (hookpoints, sae_lens_writesae, writesae) for name in public(module)]
CALLS += [f"Attached.{name}" for name in dir(Attached) if name[0] != "_" and takes_any_name(getattr(Attached, name))]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """An object of each class that has such a method."""
    model = HookedSAERecurrent.from_pretrained("embedded")
    sae = make_sae(model, hook="blocks.2.mixer.heads.1.hook_write_vec")
    recurrence = model.recurrence("The people", 1)
    attached = attach(loading.load("embedded").model)
    own = dict.fromkeys(("HookedRecurrent", "HookedSAERecurrent"), model) | {"Recurrence": recurrence}
    return own | dict.fromkeys(("MatrixSAE", "MatrixTrainingSAE"), sae) | {"Attached": attached}


@pytest.mark.parametrize("name", CALLS)
def test_a_name_that_nothing_reads_is_refused(objects: dict[str, Any], name: str, tokens: Tensor) -> None:
    """A call that is new here needs its arguments below."""
    model = objects["HookedRecurrent"]
    edit = WriteEdit(1, 0, 1, mode="delete")
    arguments: dict[str, tuple[Any, ...]] = {
        "add_hook": (HOOK, print),
        "add_sae": (objects["MatrixSAE"],),
        "boot_transformers": ("embedded",),
        "compile": (),
        "from_hf": (model.hf_model,),
        "from_pretrained": ("embedded",),
        "from_pretrained_no_processing": ("embedded",),
        "HookedSAERecurrent": (model.hf_model,),
        "recurrence": (tokens, 1),
        "replace": (),
        "run_with_edits": (tokens[:1], [edit]),
        "to": ("cpu",),
        "training_config": (model, 2, 1),
    }
    runs = ("forward", "generate", "run_with_cache", "run_with_hooks")
    with_saes = ("run_with_saes", "run_with_cache_with_saes", "run_with_hooks_with_saes")
    arguments |= dict.fromkeys((*runs, *with_saes), (tokens,))
    owner, _, method = name.rpartition(".")
    if owner:
        call = getattr(objects[owner], method)
    else:
        call = next(
            getattr(module, name) for module in (hookpoints, sae_lens_writesae, writesae) if hasattr(module, name)
        )
    with pytest.raises((TypeError, ValueError), match="no_such_word"):
        call(*arguments[method], no_such_word=1)


def test_where_transformers_loads_no_weights_it_gets_no_arguments() -> None:
    with pytest.raises(InputError, match="no_such_word"):
        HookedRecurrent.from_pretrained("embedded", device="meta", no_such_word=1)


@pytest.mark.parametrize("word", ["edits", "fwd_hooks"])
def test_words_of_other_calls_are_told_where_they_belong(objects: dict[str, Any], word: str, tokens: Tensor) -> None:
    takes = "run_with_hooks|model.hooks" if "hook" in word else "run_with_edits|model.edits"
    for call in (objects["HookedRecurrent"], objects["Attached"]):
        with pytest.raises(InputError, match=takes):
            call(tokens, **{word: []})


def test_a_model_of_other_code_gets_names_that_it_alone_knows(tokens: Tensor) -> None:
    kind: Any = type(MAKERS["qwen3_next"]())

    class Reader(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.taste = kwargs.pop("taste", None)
            return super().forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]

    model = HookedRecurrent.from_hf(Reader(MAKERS["qwen3_next"]().config))
    model(tokens, taste="sour")
    assert model.hf_model.taste == "sour"
    with pytest.raises(InputError, match="generate takes it"):
        model(tokens, edits=[])


FILTERS: dict[str, Callable[[Any, Tensor, Any], object]] = {
    "run_with_cache": lambda model, tokens, names: model.run_with_cache(tokens, names_filter=names),
    "get_caching_hooks": lambda model, _, names: model.get_caching_hooks(names),
    "run_with_hooks": lambda model, tokens, name: model.run_with_hooks(tokens, fwd_hooks=[(name, print)]),
    "add_hook": lambda model, _, name: model.add_hook(name, print),
}


@pytest.mark.parametrize("call", FILTERS)
def test_a_filter_that_matches_nothing_raises(objects: dict[str, Any], call: str, tokens: Tensor) -> None:
    def nothing(name: str) -> bool:
        return False

    for kind in ("HookedRecurrent", "Attached"):
        for names, message in (
            (nothing, "nothing.* matches none"),
            ("blocks.1.mixer.hook_writ", r"nearest: blocks\.1\.mixer\.hook_write"),
            ("blocks.1.mixer", "no hook named 'blocks.1.mixer'"),
        ):
            with torch.no_grad(), pytest.raises(UnknownHookError, match=message):
                FILTERS[call](objects[kind], tokens, names)


def test_an_empty_list_of_names_keeps_nothing(objects: dict[str, Any], tokens: Tensor) -> None:
    """On purpose, as in TransformerLens."""
    assert not dict(objects["HookedRecurrent"].run_with_cache(tokens, names_filter=[])[1].items())
