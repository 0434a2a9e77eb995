"""Loading with errors that name the file and the field.

`SAE.load_from_disk` and `TrainingSAE.load_from_disk` load these autoencoders like SAELens' own, once this package is
imported. On a damaged folder they raise a bare KeyError, or a size mismatch without a path. `load_sae` checks the
folder first and then calls them.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors import SafetensorError, safe_open

from hookpoints.errors import nearest
from hookpoints.files import SealedFolder, read_json
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig

_BESIDE_FIELDS = {"architecture", "metadata"}
"""What a saved config has beside the fields of its class."""


class CheckpointError(ValueError):
    """A folder does not hold a whole autoencoder; the message names the file and the field."""


def load_sae(path: str | Path, device: str = "cpu", dtype: str | None = None, *, training: bool = False) -> MatrixSAE:
    """Load an autoencoder that `save_inference_model` wrote, or with `training` one from a checkpoint of a run.

    An architecture of SAELens gives an object of SAELens' class.

    Args:
        path: folder with cfg.json and sae_weights.safetensors.
        device, dtype: as in `SAE.load_from_disk`; by default the dtype of the config.

    Raises:
        CheckpointError: something is missing, truncated, not finite, belongs to another architecture, is a field that
            the config does not have, is a link, or is not what `SHA256SUMS` in the folder says. This package saves that
            file with each of its autoencoders; SAELens' own uploader leaves it out, and nothing is verified then.
    """
    folder = SealedFolder(Path(path), CheckpointError)
    file = folder.folder / SAE_CFG_FILENAME
    config = _read_config(folder)
    pair = _classes(file, config, training)
    _check_fields(file, config, pair[1])
    expected = _expected(file, config | {"device": "meta"}, *pair)
    _check_weights(folder.file(SAE_WEIGHTS_FILENAME), config, expected)
    try:
        sae = (TrainingSAE if training else SAE).load_from_disk(folder.folder, device=device, dtype=dtype)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} describes no autoencoder ({type(error).__name__}: {error}).") from error
    return cast(MatrixSAE, sae)


def sae_folders(path: Path) -> list[Path]:
    """The folders of SAEs that `path` is or holds: those of `writesae train` and `demo` lie deeper.

    Raises:
        CheckpointError: there is none.
    """
    if (path / SAE_CFG_FILENAME).is_file():
        return [path]
    files = sorted(path.rglob(SAE_CFG_FILENAME))
    inside = [file.parent for file in files if "checkpoints" not in file.parts and _visible(file.relative_to(path))]
    if not inside:
        _read_config(SealedFolder(path, CheckpointError))  # says what there is
    return inside


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def folder_labels(folders: Sequence[Path]) -> list[str]:
    """Names for the SAEs in folders; one called `sae` is named after the folder that it is in. Where two of these have
    one name, as those of two heads may, the folder above is in all names."""
    own = [folder.parent if folder.name == "sae" else folder for folder in map(Path.resolve, folders)]
    names = [folder.name for folder in own]
    return names if len(set(names)) == len(names) else [f"{folder.parent.name}/{folder.name}" for folder in own]


def _read_config(folder: SealedFolder) -> dict[str, object]:
    file = folder.folder / SAE_CFG_FILENAME
    if not file.exists():
        inside = sorted(p.name for p in file.parent.iterdir()) if file.parent.is_dir() else "no such folder"
        raise CheckpointError(
            f"{file} does not exist; {file.parent} holds: {inside}. Give the folder of an SAE, or one that holds some."
        )
    try:
        config = read_json(folder.file(SAE_CFG_FILENAME))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}. Export the SAE again.") from error
    if "architecture" not in config:
        raise CheckpointError(f"{file} has no field 'architecture': not the config of a SAELens autoencoder.")
    return config


def _classes(file: Path, config: dict[str, object], training: bool) -> tuple[type[Any], type[Any]]:
    name = str(config["architecture"])
    registry, other = SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    if training:
        registry, other = other, registry
    if name in registry:
        return registry[name]
    if name in other:
        kind, wanted = ("inference", "False") if training else ("training", "True")
        raise CheckpointError(f"{file}: architecture {name!r} exists for {kind} only; call with training={wanted}.")
    near = difflib.get_close_matches(name, list(registry), n=3, cutoff=0.4)
    raise CheckpointError(
        f"{file}: architecture {name!r} is not registered (nearest: {near or sorted(registry)}). If another package "
        "defines it, import that package first."
    )


def _check_fields(file: Path, config: dict[str, object], cfg_class: type[Any]) -> None:
    """SAELens drops fields that it does not know, so that a misspelt one would quietly take its default. Its own older
    files have more fields than its classes, so only configs of this package are held to theirs."""
    if not issubclass(cfg_class, MatrixSAEConfig):
        return
    known = {field.name for field in dataclasses.fields(cfg_class)} | _BESIDE_FIELDS
    if unknown := sorted(config.keys() - known):
        raise CheckpointError(f"{file} has the unknown field(s) {', '.join(unknown)}{nearest(unknown[0], known)}.")
    if not isinstance(config.get("metadata", {}), dict):
        raise CheckpointError(f"{file}: the field 'metadata' is no object of names and values.")


def _expected(
    file: Path, config: dict[str, object], sae_class: type[Any], cfg_class: type[Any]
) -> dict[str, torch.Size]:
    """Names and shapes that the config asks for, from a model without memory."""
    try:
        sae = sae_class(cfg_class.from_dict(config))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return {name: tensor.shape for name, tensor in sae.state_dict().items()}


def _check_weights(file: Path, config: dict[str, object], expected: dict[str, torch.Size]) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}): truncated? Fetch it again.") from error
    origin = f"the architecture {config['architecture']!r} as {SAE_CFG_FILENAME} has it"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{file} lacks {missing}, which {origin} needs; it has {sorted(tensors)}.")
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{file} has {surplus}, which {origin} does not know: weights of another architecture?")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name!r} has shape {list(tensors[name].shape)}, {origin} needs {list(shape)}."
            )
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(
                f"{file}: {name!r} holds NaN or infinite values; training diverged before it was saved."
            )
