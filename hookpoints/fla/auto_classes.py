"""transformers' Auto classes, kept as they were: fla registers its own Mamba and Mamba-2 over transformers'."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def restore_auto_classes() -> None:
    """Take fla's configurations out of the place of transformers' own.

    Model types that only fla knows ("gla", "retnet" ...) stay registered: they are how its checkpoints are found.
    """
    registered = CONFIG_MAPPING._extra_content  # type: ignore[attr-defined]
    for model_type in [name for name, config in registered.items() if _is_fla(config)]:
        if model_type in CONFIG_MAPPING._mapping:  # type: ignore[attr-defined]
            del registered[model_type]


def _is_fla(config: type) -> bool:
    return config.__module__.startswith("fla.")
