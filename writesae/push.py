"""The command `writesae push`: dictionaries on the Hugging Face hub, by SAELens' own uploader, with a card.

Someone else may have written a dictionary, and a link in it may lead to a private file. So none of its files is
uploaded, but what `load_sae` read of it. Its metadata is data: a field is published only if `_FORMS` has it and its
value has the form given there, so that no token, no address and no path of this machine goes up.

The card is this package's, for SAELens' own tells no reader what registers these architectures, nor their hooks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE, upload_saes_to_huggingface
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, SAEMetadata

from hookpoints import embedded
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.matrix import REQUIRES
from sae_lens_writesae.sae.target import HeadHook
from writesae.files import sae_folders
from writesae.flags import Push

_NAME = r"[\w-][\w.-]*"
_NUMBERS = r"[-+\d., e\[\]]*|null|true|false"
"""A number or numbers, as JSON."""
_FORMS = {
    "hook_name": r"[\w.]+",
    "hook_head_index": _NUMBERS,
    "model_name": f"{_NAME}/{_NAME}",
    "model_class_name": _NAME,
    "model_fingerprint": "[0-9a-f]{64}",
    "dataset_path": f"({_NAME}/)?{_NAME}",
    "context_size": r"\d+",
    "seqpos_slice": r"\[(null|-?\d+)(, (null|-?\d+))*\]",
    "prepend_bos": _NUMBERS,
    "exclude_special_tokens": _NUMBERS,
    "sequence_separator_token": f"bos|eos|sep|{_NUMBERS}",
    "disable_concat_sequences": _NUMBERS,
    "training_architecture": _NAME,
    "loss": _NAME,
    "metric": "gauss_newton",
    "metric_damping": _NUMBERS,
    "metric_sequences": _NUMBERS,
    "l0": _NUMBERS,
    "num_dead_features": _NUMBERS,
    "n_training_rows": _NUMBERS,
    "sae_lens_version": _NAME,
    "sae_lens_training_version": _NAME,
    "requires": ".*",
}
"""Metadata that is published, and its form as text or JSON with sorted keys. Nothing else is."""
_LOADING = {
    "dtype": r"(torch\.)?\w{2,10}",
    "revision": _NAME,
    "fold_ln": _NUMBERS,
    "center_writing_weights": _NUMBERS,
    "center_unembed": _NUMBERS,
}
"""The same for `model_from_pretrained_kwargs`."""
_HUB_NAMES = ("model_name", "dataset_path")
"""Fields that name something on the hub. A relative path of this machine has the same form."""


def run_push(flags: Push) -> str:
    """Check every dictionary, then upload, one commit each, and the card last. Returns the address of its commit, or
    with `dry_run` the card.

    Raises:
        ValueError: no dictionary, a damaged one, two of one name, or a name of a repository that the hub does not
            take; before anything is uploaded.
        OSError: the hub cannot be reached, or refuses.
    """
    validate_repo_id(flags.repo)
    saes = publishable_saes(flags.folder)
    text = card(flags.repo, saes)
    if flags.dry_run:
        return text
    try:
        upload_saes_to_huggingface(cast(Any, saes), flags.repo, add_default_readme=False)
        commit = HfApi().upload_file(
            path_or_fileobj=text.encode(),
            path_in_repo="README.md",
            repo_id=flags.repo,
            commit_message="Upload the card",
        )
    except Exception as error:
        # huggingface_hub lets the errors of its client through: of httpx or httpx2, by its version.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"{flags.repo}: the hub cannot be reached ({error})") from error
    return commit.commit_url


def publishable_saes(folder: Path) -> dict[str, SAE]:
    """The dictionaries in or below a folder, with the metadata that is published, by the names that they get in a
    repository.

    Raises:
        ValueError: there is none, one is damaged or not of a head, two have the same name, or a name has other
            characters than a path of letters and digits.
    """
    saes: dict[str, SAE] = {}
    for place in sae_folders(folder):
        parts = place.relative_to(folder).parts
        sae = load_sae(place)
        HeadHook.of(sae)  # raises where it is not of a head
        sae.cfg.metadata = published_metadata(sae)
        named = (place.parent if place.name == "sae" else place).resolve()  # a run calls its result `sae`
        name = "/".join(parts[:-1] if parts[-1:] == ("sae",) else parts) or named.name
        if name in saes:
            raise ValueError(f"{named} and another folder would both be {name}: push them apart")
        if not re.fullmatch(r"[\w./=+, -]+", name):
            raise ValueError(f"{named}: expected a name of letters and digits, got {name!r}; rename the folder")
        saes[name] = sae
    return saes


def published_metadata(sae: SAE) -> SAEMetadata:
    """What is published of a dictionary's metadata."""
    metadata = sae.cfg.metadata
    values = metadata.to_dict()
    forms = _FORMS | {"requires": re.escape(REQUIRES)}
    # Models that ship with the package have names without an owner.
    forms["model_name"] = "|".join([forms["model_name"], *map(re.escape, embedded.names())])
    fields = _of_form(values, forms)
    for name in _HUB_NAMES:
        # A folder of this machine is private, and its name means nothing elsewhere.
        if name in fields and fields[name] not in embedded.names() and Path(fields[name]).exists():
            del fields[name]
    fields["model_from_pretrained_kwargs"] = _of_form(values.get("model_from_pretrained_kwargs"), _LOADING)
    # Details of training are published by the fields that the architecture's config has.
    training = SAE_TRAINING_CLASS_REGISTRY.get(fields.get("training_architecture", ""))
    if training is not None:
        settings = {field.name: f"{_NUMBERS}|{_NAME}" for field in dataclasses.fields(training[1])}
        fields["training_architecture_details"] = _of_form(values.get("training_architecture_details"), settings)
    return type(metadata)(**fields)


def _of_form(values: object, forms: Mapping[str, str]) -> dict[str, Any]:
    """The entries that have the form that is given for their name."""
    if not isinstance(values, Mapping):
        return {}
    fitting = {}
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        if name in forms and re.fullmatch(forms[name], text):
            fitting[name] = value
    return fitting


def card(repo: str, saes: Mapping[str, SAE]) -> str:
    """The repository's README.md in Markdown: how to load, and what each dictionary is."""
    first = next(iter(saes))
    configs = {name: sae.cfg for name, sae in saes.items()}
    metadata = configs[first].metadata
    models = sorted({cfg.metadata.model_name or "a local model" for cfg in configs.values()})
    data = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "saelens", "writesae"],
        # Only OWNER/NAME is a page of the hub.
        base_model=models[0] if len(models) == 1 and "/" in models[0] else None,
    )
    registers = "import sae_lens_writesae  # registers the architectures in SAELens (package sae-lens-writesae)"
    needs_plugin = any("requires" in cfg.metadata for cfg in configs.values())
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# Dictionaries of what recurrent heads of {', '.join(models)} write",
        "",
        "At each token, a head of a recurrent layer adds one small matrix to its state. These sparse autoencoders read "
        "such matrices (or the states), flattened key-first [K*V], at the hooks below.",
        "",
        "```python",
        *([registers] if needs_plugin else []),
        "from sae_lens import SAE",
        f"sae = SAE.from_pretrained({repo!r}, {first!r})",
        "```",
        "",
        "In the model, with its error left out:",
        "",
        "```python",
        "from sae_lens_writesae import HookedSAERecurrent",
        f"model = HookedSAERecurrent.from_pretrained({metadata.model_name or 'the folder of your model'!r})",
        'logits, cache = model.run_with_cache_with_saes("The people of the United States", saes=[sae])',
        f"acts = cache[{f'{metadata.hook_name}.hook_sae_acts_post'!r}]  # [batch, token, atom]",
        "```",
        "",
        "| name | hook | K x V | atoms | architecture | trained on |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| `{name}` | {' | '.join(table_cells(cfg))} |" for name, cfg in configs.items()),
        "",
    ]
    return "\n".join(lines)


def table_cells(cfg: SAEConfig) -> tuple[str, ...]:
    metadata = cfg.metadata
    fields = cast(Any, cfg)
    shape = f"{fields.d_k} x {fields.d_v}" if hasattr(cfg, "d_k") else f"{cfg.d_in} numbers"
    factors = f", rank {fields.rank}, encoder {fields.encoder}" if hasattr(cfg, "rank") else ""
    length = f", sequences of {metadata.context_size} tokens" if metadata.context_size else ""
    return (
        f"`{metadata.hook_name}`",
        shape,
        str(cfg.d_sae),
        f"{metadata.training_architecture or cfg.architecture()}{factors}",
        f"{metadata.dataset_path or 'a text that was given'}{length}",
    )
