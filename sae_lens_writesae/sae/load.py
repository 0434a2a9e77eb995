"""Loading with errors that name the file and the field.

`SAE.load_from_disk` and `TrainingSAE.load_from_disk` load these autoencoders like SAELens' own, once this package is
imported. On a damaged folder they raise a bare KeyError, or a size mismatch without a path. `load_sae` checks the
folder first and then calls them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import load_file

from hookpoints import HookedRecurrent
from hookpoints.errors import nearest
from hookpoints.files import SealedFolder, read_json
from sae_lens_writesae.sae.matrix import CHECKPOINT_ENTRY, MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.target import Dictionary

_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What SAELens, torch and Python raise on a damaged config or file."""


def model_of(
    saes: Sequence[Dictionary], name: str | None = None, *, dtype: str = "float32", other_model: bool = False
) -> HookedRecurrent:
    """The model that is named, or else the one of dictionaries, by name and commit.

    Raises:
        InputError: a dictionary was trained on other weights, and `other_model` is False.
        UnknownModelError: there is no such model; the hub is not asked for a path.
    """
    revision = None
    if name is None:
        metadata = saes[0].cfg.metadata
        name = str(metadata.model_name)
        options = metadata.model_from_pretrained_kwargs
        revision = options.get("revision") if isinstance(options, Mapping) else None
    model = HookedRecurrent.from_pretrained(name, dtype=dtype, revision=revision)
    for sae in saes:
        model.check_dictionary(sae.cfg.metadata, refuse=not other_model)
    return model


class CheckpointError(ValueError):
    """A folder does not hold a whole autoencoder; the message names the file and the field."""


def load_sae(path: str | Path, device: str = "cpu", dtype: str | None = None, *, training: bool = False) -> MatrixSAE:
    """Load an autoencoder that `save_inference_model` or `save_model` wrote, or a checkpoint of a run: for inference,
    or with `training` as it was trained.

    An architecture of SAELens gives an object of SAELens' class.

    Args:
        path: folder with cfg.json and sae_weights.safetensors.
        device: by default the CPU, as in `SAE.load_from_disk`; a model goes to `hookpoints.default_device()`.
        dtype: by default that of the config.

    Raises:
        CheckpointError: something is missing, truncated, not finite, belongs to another architecture, is a field that
            the config does not have, is a link, or is not what `SHA256SUMS` in the folder says. This package saves that
            file with each of its autoencoders; SAELens' own uploader leaves it out, and nothing is verified then.
    """
    folder = SealedFolder(Path(path), CheckpointError)
    file = folder.file(SAE_CFG_FILENAME)
    place = folder.file(SAE_WEIGHTS_FILENAME)
    try:
        config = read_json(file)
        weights = load_file(place)
        of_checkpoint = training or CHECKPOINT_ENTRY in weights
        registry: Mapping[str, Any] = SAE_TRAINING_CLASS_REGISTRY if of_checkpoint else SAE_CLASS_REGISTRY
        name = str(config.get("architecture"))
        if name not in registry:
            raise CheckpointError(
                f"{file}: expected an architecture that is registered with training={of_checkpoint}, got {name!r}"
                f"{nearest(name, registry)}. If another package defines it, import that package first"
            )
        sae_class, cfg_class = registry[name]
        if issubclass(cfg_class, MatrixSAEConfig):  # SAELens drops fields that it does not know, as misspelt ones
            known = {field.name for field in dataclasses.fields(cfg_class)} | {"architecture", "metadata"}
            if unknown := sorted(config.keys() - known):
                raise CheckpointError(f"{file} has the unknown field(s) {unknown}{nearest(unknown[0], known)}")
        # On "meta" nothing is allocated: a config may ask for any size.
        expected = sae_class(cfg_class.from_dict(config | {"device": "meta"})).state_dict()
        shapes = {key: list(x.shape) for key, x in expected.items()}
        stored = {key: list(x.shape) for key, x in weights.items()}
        for key in sorted({*stored, *shapes}):
            if stored.get(key) != shapes.get(key):
                raise CheckpointError(f"{place}: expected {key} of shape {shapes.get(key)}, got {stored.get(key)}")
            if not weights[key].isfinite().all():
                raise CheckpointError(f"{place}: expected finite numbers, got NaN or infinity in {key}")
        loader = TrainingSAE if training else SAE
        return cast(MatrixSAE, loader.load_from_disk(path, device=device, dtype=dtype))
    except CheckpointError:
        raise
    except (*_DAMAGE, SafetensorError) as error:
        raise CheckpointError(f"{file}, {place.name}: no autoencoder ({type(error).__name__}: {error})") from error
