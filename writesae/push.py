"""The command `writesae push`: dictionaries on the Hugging Face hub, with a card of their own.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import tyro

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAEConfig, SAEMetadata

    from writesae.files import Json

_FILES = ("cfg.json", "sae_weights.safetensors", "SHA256SUMS")
"""What is uploaded of a dictionary: what SAELens loads, and its checksums."""
_NAME = r"[\w-][\w.-]*"
_FORMS = {"dataset_path": f"({_NAME}/)?{_NAME}", "training_architecture": _NAME, "context_size": r"\d+"}
"""Forms of metadata that the card names. What has another form is not published."""
_PLACE = re.compile(r"\\|~|(?<![\w./:-])/|\b\w:/|file:")
"""In JSON: the absolute path of a folder, and any character that JSON escapes."""


class Published(NamedTuple):
    """A dictionary that is to be uploaded."""

    folder: Path
    """Where it was read."""
    model: str
    """Where its model is, which may be a folder of this machine."""
    cfg: SAEConfig
    """As it is published."""
    cell: str
    """Its head: L2H0."""

    @property
    def own_name(self) -> Path:
        """The folder that names it: `sae` is what a run calls its result."""
        return (self.folder.parent if self.folder.name == "sae" else self.folder).resolve()


@dataclass(frozen=True)
class Push:
    """Publish dictionaries on the Hugging Face hub, with a card: hook, measured quality, and the lines that load them.

    The repository is made if there is none. All files go up in one commit, so that it is whole or absent; a card
    that is there is replaced. Log in first: `hf auth login`.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of a dictionary, or one below which `writesae train`, `demo` or `reproduce` left some."""
    repo: tyro.conf.Positional[str]
    """Repository, OWNER/NAME."""
    results: tuple[Path, ...] = ()
    """Folders in or below which `writesae eval` left results, for the quality on the card; by default `folder`."""
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
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(self.repo)
        with tempfile.TemporaryDirectory() as fresh:
            saes = saved_anew(self.folder, Path(fresh))
            text = card(self.repo, saes, self._quality(saes))
            files = [f"{name}/{file}" for name in saes for file in _FILES]
            if self.dry_run:
                return "\n".join([*files, "README.md", "", text])
            additions = [CommitOperationAdd(file, Path(fresh, file)) for file in files]
            additions.append(CommitOperationAdd("README.md", text.encode()))
            api = HfApi()
            try:
                api.create_repo(self.repo, private=self.private or None, exist_ok=True)
                commit = api.create_commit(self.repo, additions, commit_message=f"Upload {', '.join(saes)}")
            except OSError:
                raise
            except Exception as error:  # of the HTTP client, whose classes belong to none of these
                raise OSError(f"{self.repo} was not uploaded to {api.endpoint}: {error}") from error
        return str(commit.commit_url)

    def _quality(self, saes: Mapping[str, Published]) -> dict[str, Mapping[str, Json]]:
        """What results say of the dictionaries, by their names in the repository; nothing, where they say nothing."""
        from writesae.page.report import find_results, quality_rows

        places = self.results or [self.folder] * any(self.folder.rglob("info.json"))
        rows = {(row["model"], row["head"], row["dictionary"]): row for row in quality_rows(find_results(places))}
        found: dict[str, Mapping[str, Json]] = {}
        for name, sae in saes.items():
            own = sae.own_name
            for label in (own.name, f"{own.parent.name}/{own.name}"):  # as `folder_labels` gives them
                if row := rows.get((sae.model, sae.cell, label)):
                    found[name] = row
        return found


def saved_anew(folder: Path, fresh: Path) -> dict[str, Published]:
    """Load the dictionaries in or below a folder, and save each into `fresh`, under the name that it gets in a
    repository. Returns them by these names.

    Raises:
        ValueError: there is none, one is damaged or not of a head, two have the same name, or a name has other
            characters than a path of letters and digits.
    """
    from hookpoints.files import write_checksums
    from sae_lens_writesae.sae.load import load_sae
    from sae_lens_writesae.sae.target import HeadHook

    found: dict[str, Published] = {}
    for file in sorted(folder.rglob("cfg.json")):
        parts = file.parent.relative_to(folder).parts
        if any(part.startswith(".") or part == "checkpoints" for part in parts):
            continue
        loaded = load_sae(file.parent)
        model, loaded.cfg.metadata = str(loaded.cfg.metadata.model_name), _told(loaded.cfg.metadata)
        sae = Published(file.parent, model, loaded.cfg, HeadHook.of(loaded).cell)
        name = "/".join(parts[:-1] if parts[-1:] == ("sae",) else parts) or sae.own_name.name
        if name in found:
            raise ValueError(f"{found[name].folder} and {file.parent} would both be {name}: push them apart")
        if not re.fullmatch(r"[\w./=+, -]+", name):
            raise ValueError(f"{file.parent}: expected a name of letters and digits, got {name!r}; rename the folder")
        loaded.save_model(fresh / name)
        write_checksums(fresh / name, _FILES[:2])
        found[name] = sae
    if not found:
        raise ValueError(f"no dictionary lies in or below {folder} (looked for cfg.json)")
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


def card(repo: str, saes: Mapping[str, Published], quality: Mapping[str, Mapping[str, Json]]) -> str:
    """The repository's README.md in Markdown: how to load, what each dictionary is, and what was measured of it."""
    from huggingface_hub import ModelCardData

    first, *_ = saes
    metadata = saes[first].cfg.metadata
    models = sorted({sae.cfg.metadata.model_name or "a local model" for sae in saes.values()})
    base = models[0] if len(models) == 1 and "/" in models[0] else None
    tags = ["sparse-autoencoder", "saelens", "writesae"]
    plugin = any("requires" in sae.cfg.metadata for sae in saes.values())
    lines = [
        "---",
        ModelCardData(library_name="saelens", tags=tags, base_model=base).to_yaml(),
        "---",
        "",
        f"# Dictionaries of what recurrent heads of {', '.join(models)} write",
        "",
        "At each token, a head of a recurrent layer adds one small matrix to its state. These sparse autoencoders read "
        "such matrices (or the states), flattened key-first [K*V], at the hooks below.",
        "",
        "```python",
        *["import sae_lens_writesae  # registers the architectures in SAELens (package sae-lens-writesae)"] * plugin,
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
        *_table(
            ("name", "hook", "K x V", "atoms", "architecture", "trained on"),
            [(f"`{name}`", *_described(sae.cfg)) for name, sae in saes.items()],
        ),
    ]
    if measured := [(f"`{name}`", *_measured(quality[name])) for name in saes if name in quality]:
        head = ("name", "tokens", "L0", "explained variance", "cosine", "alive", "KL recovered")
        lines += ["## Measured", "", *_table(head, measured)]
        lines += [
            "On held-out text. Cosine: of a write with its dominant atom. KL recovered: 1 - KL(every write replaced by "
            "its reconstruction) / KL(every write deleted), with a 95 % interval over sequences.",
            "",
        ]
    if missing := [f"`{name}`" for name in saes if name not in quality]:
        lines += [f"No measured quality was saved for {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _described(cfg: SAEConfig) -> tuple[str, ...]:
    metadata, fields = cfg.metadata, cast(Any, cfg)
    shape = f"{fields.d_k} x {fields.d_v}" if hasattr(cfg, "d_k") else f"{cfg.d_in} numbers"
    factors = f", rank {fields.rank}, encoder {fields.encoder}" if hasattr(cfg, "rank") else ""
    data = metadata.dataset_path or "a text that was given"
    trained = f"{data}, sequences of {metadata.context_size} tokens" if metadata.context_size else data
    architecture = f"{metadata.training_architecture or cfg.architecture()}{factors}"
    return f"`{metadata.hook_name}`", shape, str(cfg.d_sae), architecture, trained


def _measured(quality: Mapping[str, Json]) -> tuple[str, ...]:
    from writesae.verdict.format import number, percent, span

    def or_dash(value: Json) -> str:
        return "–" if value is None else number(cast(float, value))

    recovered = cast("dict[str, float] | None", quality["recovered"])
    share = "–"
    if recovered is not None:
        share = percent(recovered["mean"])
        if recovered["low"] is not None:
            share += f" ({span(recovered['low'], recovered['high'])})"
    return (
        str(int(cast(float, quality["n_tokens"]))),
        or_dash(quality["l0"]),
        or_dash(quality["explained"]),
        or_dash(quality["cosine"]),
        percent(cast(float, quality["alive"])),
        share,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]
