"""What other libraries put around a model: taken off where hook points inside act all the same, else refused.

Classes are known by their names, so that none of those libraries need be installed or imported.
"""

from __future__ import annotations

from torch import nn

from hookpoints.errors import UnsupportedModelError

_INSIDE = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "nnsight.intervention.envoy.Envoy": "_module",
}
"""Class -> the attribute that holds what it wraps. It calls that, so that hooks in it fire when the wrapper runs."""
_SHARDED = "it holds weights in pieces, and hook points read whole ones; hook the model before it is sharded"
_REFUSED = {
    "torch.nn.parallel.data_parallel.DataParallel": "it runs copies of the model, which hook points "
    "do not reach; use DistributedDataParallel, or the model itself (.module)",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": _SHARDED,
    "torch.distributed.fsdp.FSDPModule": _SHARDED,
    "deepspeed.runtime.engine.DeepSpeedEngine": f"{_SHARDED}, or its .module where nothing is sharded",
    "transformers.pipelines.base.Pipeline": "it is a pipeline; its model is .model",
}
"""Class -> why it cannot be hooked."""


def unwrap(model: object) -> nn.Module:
    """The model inside of ``torch.compile``, DistributedDataParallel, PEFT and nnsight, in any nesting.

    Raises:
        UnsupportedModelError: something that cannot be hooked from inside, or that is no model; says why.
    """
    classes = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    reason = next((_REFUSED[name] for name in classes if name in _REFUSED), None) or _has_prompts(model)
    if inside := next((_INSIDE[name] for name in classes if name in _INSIDE and reason is None), None):
        return unwrap(getattr(model, inside))
    if reason is not None or not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be hooked: {reason or 'it is no torch.nn.Module'}"
        )
    return model


def _has_prompts(model: object) -> str | None:
    """PEFT's prompt methods act outside of the model that they wrap."""
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(config.is_prompt_learning for config in configs.values()):
        return "PEFT puts virtual tokens before the model's input, which hooks inside would not know of"
    return None
