"""Loading causal language models for hooking: from the hub, from a folder, or from this package."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hookpoints import embedded, zoo
from hookpoints.errors import (
    HookpointsError,
    InputError,
    UnknownModelError,
    UnsupportedModelError,
    nearest,
    require_whole,
)
from hookpoints.files import SealedFolder, read_json
from hookpoints.fla.checkpoints import split_gates, weight_files
from hookpoints.fla.importing import MODEL_TYPES, import_fla, restore_auto_classes
from hookpoints.model.refused import refuse_arguments
from hookpoints.rules.known import REFUSED, RULES
from hookpoints.rwkv7.configuration import RWKV7Config
from hookpoints.rwkv7.modeling import RWKV7ForCausalLM, from_pth

_Classes = tuple[Any, Any]
"""A configuration class and a model class, or transformers' Auto classes, which share no type with them."""
_OWN_CLASSES: dict[str, _Classes] = {
    # Importing fla puts its own Mamba and Mamba-2 in the Auto classes' place, which read other weights.
    "mamba": (MambaConfig, MambaForCausalLM),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM),
    # fla's format, in plain torch: nothing to install, and no kernels that need a GPU.
    "rwkv7": (RWKV7Config, RWKV7ForCausalLM),
}
"""Classes of model types that the Auto classes do not know, or do not always know rightly."""
_AUTO_CLASSES: _Classes = (AutoConfig, AutoModelForCausalLM)
if hasattr(transformers, "Glm5NextConfig"):  # multimodal, without a class for its text model alone
    _OWN_CLASSES["glm5_next"] = (transformers.Glm5NextConfig, transformers.Glm5NextForConditionalGeneration)


class Loaded(NamedTuple):
    """A model and its tokenizer (None where the checkpoint has none)."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None


def default_device() -> str:
    """Where a model goes of which nothing is said: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(
    name_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    **hf_kwargs: object,
) -> Loaded:
    """Load the text model of a checkpoint: a name on the hub, a folder, or an official RWKV-7 file (``.pth``). No code
    from the checkpoint is run; of folders and the hub only safetensors are read.

    Published Qwen3.5 checkpoints carry a multimodal configuration; their text model is what is loaded. On the device
    "meta" no weights are read: the model has its shapes, and cannot run.

    Raises:
        InputError: the device is not there, no such dtype, or arguments for transformers where it loads no weights.
        UnknownModelError: no such model; names the nearest, and what is at hand.
        UnsupportedModelError: a checkpoint without a causal language model, in the format of the mamba_ssm package
            (names the converted one), or with tensors missing, unknown or of another shape (names them).
    """
    if hf_kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code is not supported: hookpoints runs no code from a checkpoint")
    rooms = [room for room in (embedded, zoo) if name_or_path in room.names()]
    source = str(rooms[0].path(name_or_path)) if rooms else name_or_path
    _refuse_unknown(name_or_path)
    _check_device(device)
    without_weights = device is not None and torch.device(device).type == "meta"
    hf_kwargs = refuse_arguments(hf_kwargs)
    dtype = _asked_dtype(dtype, hf_kwargs.pop("torch_dtype", None))
    if hf_kwargs and (without_weights or source.endswith(".pth")):
        raise InputError(
            f"from_pretrained takes no {', '.join(hf_kwargs)} here: transformers loads neither a .pth file nor the "
            "weights of device='meta'"
        )
    with _errors_name_the_model(name_or_path):
        if (
            Path(name_or_path).is_dir() and not without_weights
        ):  # of one that ships with the package, an installer may link files
            _check_files(Path(source))
        model = _loaded_model(name_or_path, source, dtype, revision, hf_kwargs, without_weights)
    if without_weights:
        return Loaded(model.to("meta"), None)
    if hf_kwargs.get("device_map") is None:
        model = model.to(device or default_device())
    return Loaded(model, _loaded_tokenizer(source, revision))


def _asked_dtype(asked: object, synonym: object) -> torch.dtype | str:
    """The dtype that a model gets: "auto", or one of torch.

    Args:
        synonym: ``torch_dtype``, transformers' older name for it.
    """
    names = [str(one).removeprefix("torch.") for one in (asked, synonym) if one is not None] or ["float32"]
    dtypes = {getattr(torch, name, name) for name in names}
    if len(dtypes) > 1:
        raise InputError(f"dtype and torch_dtype: expected one of the two, got {asked!r} and {synonym!r}")
    dtype = dtypes.pop()
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise InputError(f"dtype: expected 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got {names[0]!r}")


def _check_device(device: str | torch.device | None) -> None:
    """Raise InputError for a device that is not there, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]
        raise InputError(
            f"device: expected one of this machine ({default_device()}, say), got {device!r}: {told}"
        ) from error


def empty(config: PreTrainedConfig) -> nn.Module:
    """The model that a configuration describes, on the device "meta": it has shapes, and no weights."""
    with torch.device("meta"):
        if config.model_type in _OWN_CLASSES:
            return _OWN_CLASSES[config.model_type][1](config)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _loaded_model(
    name: str,
    source: str,
    dtype: torch.dtype | str,
    revision: str | None,
    hf_kwargs: dict[str, object],
    without_weights: bool,
) -> nn.Module:
    if source.endswith(".pth"):
        return from_pth(source, getattr(torch, str(dtype).removeprefix("torch."), None))  # "auto": the file's own
    # The configuration says whether and by which classes the weights are read.
    try:
        saved, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        if Path(source).is_dir():
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UnknownModelError(_unknown_model(name, f"of the hub: {reason}")) from error
    _refuse_mamba_ssm(name, saved)
    _refuse_unsupported(name, saved.get("model_type"))  # before anything of it is imported or fetched
    is_own = saved.get("model_type") in _OWN_CLASSES
    of_fla = not is_own and saved.get("model_type") in MODEL_TYPES
    if of_fla:
        import_fla()  # registers them
    restore_auto_classes()  # someone else may have imported fla
    configs, models = _OWN_CLASSES.get(saved.get("model_type", ""), _AUTO_CLASSES)
    # Without a word on trust, the Auto classes ask on the terminal whether to run the code that a config names.
    trust = {} if is_own else {"trust_remote_code": False}
    try:
        config = configs.from_pretrained(source, revision=revision, **trust)
    except ValueError as error:
        _refuse_unknown_type(name, saved.get("model_type"), error)
        raise
    _refuse_unsupported(name, config.model_type)
    if not is_own and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type!r} checkpoint, which has no causal language model"
        )
    if without_weights:
        return empty(config)
    # The weights: transformers fills what it does not find with random numbers, so its report is read.
    if of_fla and config.model_type != "retnet" and getattr(config, "attn_mode", None) == "fused_chunk":
        config.attn_mode = "chunk"  # the same rule: fla has dropped the other schedule
    # Shapes that do not fit are reported like the rest, and then refused with their names.
    options = {"dtype": dtype, "use_safetensors": True, **trust, **hf_kwargs}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if of_fla:
        options["config"] = config
    model, report = models.from_pretrained(source, revision=revision, **options)
    if of_fla:
        split_gates(model, report, weight_files(source, revision=revision))
    faults = {
        "lacks": report["missing_keys"],
        "has the unknown": report["unexpected_keys"],
        "has the wrong shape of": [str(key[0]) for key in report["mismatched_keys"]],
    }
    fix = f"Download or convert it again, or name the architecture that it was saved with in its {CONFIG_NAME}"
    require_whole(f"{name!r} is not a whole checkpoint of its architecture", faults, fix)
    return model


# -- what a folder holds


def _check_files(folder: Path) -> None:
    """Raise ChecksumError where a file that loading reads is a link, or is not what seals it, and UnsupportedModelError
    where the index of the weights names a file elsewhere. Costs one reading of all files where the folder is sealed."""
    names = {file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
    SealedFolder(folder).check(names)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    shards = cast("dict[str, str]", read_json(index)["weight_map"]) if index.is_file() else {}
    if elsewhere := sorted(set(shards.values()) - names):  # names in files are data
        raise UnsupportedModelError(f"{index} names {elsewhere[0]!r}, which is no file of its folder")


@contextmanager
def _errors_name_the_model(name: str) -> Iterator[None]:
    """Errors of the libraries below, which name neither model nor file, become one that does."""
    try:
        yield
    except (HookpointsError, MemoryError, torch.OutOfMemoryError, ImportError, TypeError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name!r} cannot be loaded: a file of it is damaged, or its {CONFIG_NAME} describes no model that "
            f"transformers can build ({type(error).__name__}: {error})"
        ) from error


def whole_name(name: str) -> str:
    """The name of a model that holds in any folder: a folder or a file of this machine as an absolute path, for the hub
    is not to be asked for its name."""
    ships = name in embedded.names() or name in zoo.names()
    return name if ships or not Path(name).exists() else str(Path(name).resolve())


def cached() -> list[str]:
    """Names of the models in the hub's cache on this machine. Costs one listing of a folder."""
    names = (folder.name.removeprefix("models--") for folder in Path(HF_HUB_CACHE).glob("models--*"))
    return sorted(name.replace("--", "/") for name in names)


def model_types() -> dict[str, list[str]]:
    """Model types that can be loaded: rule -> those of the installed transformers whose layers call its op and are not
    refused, and hookpoints' own; "with the extra fla" -> those that flash-linear-attention defines. Costs a tenth of a
    second: transformers' source is read, none of it imported."""
    by_rule: dict[str, list[str]] = {"RWKV-7": ["rwkv7"]}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        model_type = file.parent.name
        if model_type in REFUSED or f"{model_type}_text" in REFUSED:
            continue
        text = file.read_text(encoding="utf-8")
        for rule in RULES:
            if f"def {rule.ops[0]}(" in text:
                by_rule.setdefault(rule.name, []).append(model_type)
    return by_rule | {"with the extra fla": sorted(MODEL_TYPES - _OWN_CLASSES.keys() - REFUSED.keys())}


def _refuse_unknown(name: str) -> None:
    """What cannot be a name on the hub is refused without asking there, which takes a while where there is no network.
    Models that stand there without an owner are of the hub's first days; none of them is recurrent."""
    known = [*embedded.names(), *zoo.names(), *cached()]
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(".pth")
    if name not in known and not Path(name).exists() and not on_hub:
        raise UnknownModelError(_unknown_model(name, "no name on the hub, which is OWNER/NAME"))


def _unknown_model(name: str, reason: str) -> str:
    known = [*embedded.names(), *zoo.names(), *cached()]
    near = nearest(name, known).removeprefix("; ") or f"on this machine: {', '.join(known)}"
    return f"there is no model {name!r}: no folder, none that ships with hookpoints, and {reason}; {near}"


def _refuse_unsupported(name: str, model_type: object) -> None:
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedModelError(f"{name!r} cannot be hooked: {REFUSED[model_type]}")


def _refuse_unknown_type(name: str, model_type: object, error: ValueError) -> None:
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{name!r} cannot be loaded: expected a model type that transformers {transformers.__version__} has, got "
            f"{model_type!r}; upgrade transformers, if a later release has it (no code from a checkpoint is run)"
        ) from error


def _refuse_mamba_ssm(name: str, config: Mapping[str, Any]) -> None:
    """Checkpoints of the mamba_ssm package (state-spaces/...) have no model type, and other names for their weights.
    Mamba-1's were converted by their authors."""
    if "model_type" in config or "ssm_cfg" not in config:
        return
    owner = "AntonV" if (config["ssm_cfg"] or {}).get("layer") == "Mamba2" else "state-spaces"
    size = PurePath(name).name
    raise UnsupportedModelError(
        f"{name!r} is in the format of the mamba_ssm package, which transformers does not load. "
        f"Load the converted checkpoint: {owner}/{size}-hf for state-spaces/{size}"
    )


def _loaded_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower one
        # A model without one is still useful, and methods that need one say so; but a broken one must not look absent.
        files = ", ".join(file.name for file in sorted(Path(source).glob("*token*.json"))) or "no file of a tokenizer"
        warnings.warn(
            f"{source}: loaded without a tokenizer, from {files} ({type(error).__name__}: {error})", stacklevel=2
        )
        return None
