"""The command `writesae push`: dictionaries on the Hugging Face hub, with a card.

The files are those that SAELens downloads, so that `SAE.from_pretrained(REPO, NAME)` loads each. SAELens' own card
would not do: its code does not import this package, and ends in a KeyError for these architectures.

Someone else may have written a dictionary, and a link in it may lead to a private file. So none of its files is
uploaded: what `load_sae` read is saved again into a new folder, and only that folder goes up. Its metadata is data:
fields that name a place on this machine are left out, and what the card names has the form of a name.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tyro

from writesae.files import sae_folders

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEConfig, SAEMetadata


_NAME = r"[\w-][\w.-]*"
_FORMS = {"dataset_path": f"({_NAME}/)?{_NAME}", "training_architecture": _NAME, "context_size": r"\d+"}
"""Forms of metadata that the card names. What has another form is not published."""
_PLACE = re.compile(r"\\|~|(?<![\w./:-])/|\b\w:/|file:")
"""In JSON: the absolute path of a folder, and any character that JSON escapes."""


@dataclass(frozen=True)
class Push:
    """Publish dictionaries on the Hugging Face hub, with a card: their hooks, and the lines that load them.

    The repository is made if there is none. All files go up in one commit, so that it is whole or absent; a card
    that is there is replaced. Log in first: `hf auth login`.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of a dictionary, or one below which `writesae train`, `demo` or `reproduce` left some."""
    repo: tyro.conf.Positional[str]
    """Repository, OWNER/NAME."""
    private: bool = False
    """Make the repository private, if it is new."""
    dry_run: bool = False
    """Print the names of the files and the card, and upload nothing."""

    def run(self) -> str:
        """Check every dictionary, then upload; returns the address of the commit.

        Raises:
            ValueError: no dictionary, a damaged one, two of one name, or a name of a repository that the hub does not
                take.
            OSError: the hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        from sae_lens_writesae.files import atomic_text

        validate_repo_id(self.repo)
        with tempfile.TemporaryDirectory() as folder:
            saes = saved_anew(self.folder, Path(folder))
            text = atomic_text(Path(folder, "README.md"), card(self.repo, saes)).read_text("utf-8")
            if self.dry_run:
                files = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())
                return "\n".join([*files, "", text])
            HfApi().create_repo(self.repo, private=self.private or None, exist_ok=True)
            return (
                HfApi()
                .upload_folder(repo_id=self.repo, folder_path=folder, commit_message=f"Upload {', '.join(saes)}")
                .commit_url
            )


def saved_anew(folder: Path, fresh: Path) -> dict[str, SAE]:
    """Load the dictionaries in or below a folder, and save each into `fresh`, under the name that it gets in a
    repository. Returns them by these names.

    Raises:
        ValueError: there is none, one is damaged or not of a head, two have the same name, or a name has other
            characters than a path of letters and digits.
    """
    from hookpoints.files import write_checksums
    from sae_lens_writesae.sae.load import load_sae
    from sae_lens_writesae.sae.target import HeadHook

    found: dict[str, SAE] = {}
    for place in sae_folders(folder):
        parts, sae = place.relative_to(folder).parts, load_sae(place)
        HeadHook.of(sae)  # raises where it is not of a head
        sae.cfg.metadata = _told(sae.cfg.metadata)
        own = (place.parent if place.name == "sae" else place).resolve()  # a run calls its result `sae`
        name = "/".join(parts[:-1] if parts[-1:] == ("sae",) else parts) or own.name
        if name in found:
            raise ValueError(f"{own} and another folder would both be {name}: push them apart")
        if not re.fullmatch(r"[\w./=+, -]+", name):
            raise ValueError(f"{own}: expected a name of letters and digits, got {name!r}; rename the folder")
        sae.save_model(fresh / name)
        write_checksums(fresh / name, ("cfg.json", "sae_weights.safetensors"))
        found[name] = sae
    return found


def _told(metadata: SAEMetadata) -> SAEMetadata:
    """Metadata without fields that name a place on this machine, or that do not have the form of their field."""
    from hookpoints import embedded

    forms = _FORMS | {"model_name": "|".join([f"{_NAME}/{_NAME}", *embedded.names()])}
    return type(metadata)(
        **{
            field: value
            for field, value in metadata.items()
            if not _PLACE.search(json.dumps([field, value], ensure_ascii=False))
            and re.fullmatch(forms.get(field, ".*"), str(value), re.DOTALL)
        }
    )


def card(repo: str, saes: Mapping[str, SAE]) -> str:
    """The repository's README.md in Markdown: how to load, and what each dictionary is."""
    from huggingface_hub import ModelCardData

    first, configs = next(iter(saes)), {name: sae.cfg for name, sae in saes.items()}
    metadata = configs[first].metadata
    models = sorted({cfg.metadata.model_name or "a local model" for cfg in configs.values()})
    lines = [
        "---",
        ModelCardData(
            library_name="saelens",
            tags=["sparse-autoencoder", "saelens", "writesae"],
            base_model=models[0] if len(models) == 1 and "/" in models[0] else None,
        ).to_yaml(),
        "---",
        "",
        f"# Dictionaries of what recurrent heads of {', '.join(models)} write",
        "",
        "At each token, a head of a recurrent layer adds one small matrix to its state. These sparse autoencoders read "
        "such matrices (or the states), flattened key-first [K*V], at the hooks below.",
        "",
        "```python",
        *["import sae_lens_writesae  # registers the architectures in SAELens (package sae-lens-writesae)"]
        * any("requires" in cfg.metadata for cfg in configs.values()),
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
        *(f"| `{name}` | {' | '.join(_described(cfg))} |" for name, cfg in configs.items()),
        "",
    ]
    return "\n".join(lines)


def _described(cfg: SAEConfig) -> tuple[str, ...]:
    metadata, fields = cfg.metadata, cast(Any, cfg)
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
