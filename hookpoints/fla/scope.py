"""What a model of fla needs while it is hooked: two of its arguments are set right, and two of its forms refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.layer.intercept import Function, wrap_forward


def is_fla(model: nn.Module) -> bool:
    """Whether a model's class comes from fla."""
    return any(base.__module__.startswith("fla.") for base in type(model).__mro__)


def wrap_model(model: nn.Module) -> Callable[[], None]:
    """Set arguments of each forward of an fla model right; returns what takes it off.

    * transformers 5.24 hands ``generate``'s cache over as ``cache``. fla 0.6 takes ``past_key_values``, ignores the
      rest, and so decodes each token as if it were the first: here it gets the cache under the name that it knows.
    * fla's layers unpad a batch whenever they get an attention mask. One that masks nothing (``generate`` always
      passes one) only costs time, so it is left out.

    Raises:
        UnsupportedModelError: the model has no residual stream; and at a forward, for packed sequences.
    """
    if getattr(getattr(model, "config", None), "attnres_block_size", None) is not None:
        raise UnsupportedModelError(
            "this model mixes the outputs of all earlier blocks (attnres_block_size), so it has no residual stream "
            "for block hooks; models without it are supported"
        )
    knows_cache = "cache" in inspect.signature(model.forward).parameters

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if kwargs.get("cu_seqlens") is not None:
            raise UnsupportedModelError(
                "packed sequences (cu_seqlens) cannot be hooked: pass a padded batch with its attention_mask"
            )
        if kwargs.get("cache") is not None and not knows_cache:
            kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
            del kwargs["cache"]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and bool((mask != 0).all()):
            kwargs = {**kwargs, "attention_mask": None}
        return forward(*args, **kwargs)

    return wrap_forward(model, around)
