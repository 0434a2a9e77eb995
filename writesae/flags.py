"""The flags of each command: fields are flags, docstrings are their help (tyro). Loads no torch, for the sake of help.

`cli.COMMANDS` says which function takes them. Where they have a method `check`, it looks for folders before that
function, and with it torch, is imported.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from writesae.choices import DictionaryName, Dtype, Loss, MetricName, Target, at_least, expect, once_each
from writesae.files import sae_folders


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Let a language model read a text in which a sentence contradicts another, read its memory back in words, cut out
    the sentence that an answer hangs on, and ask again; then train two dictionaries on what one head writes.

    The head is the one whose writes do most, of those that remember for a while. One dictionary is trained for squared
    errors, one for errors in the model's own metric. A table says what they recover on held-out text. The page has the
    memory before and after the cut, the reader's scores of the sentence, the circuit of the answer, and the table.
    Offline, in a minute or two on two cores."""

    model: str = "embedded"
    """Model to look into: one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7)."""
    d_sae: int = 256
    """Atoms of a dictionary."""
    training_tokens: int = 64_000
    """Tokens that each dictionary is trained on."""
    eval_sequences: int = 24
    """Sequences of the held-out text."""
    seed: int = 0
    """Seed of training."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one."""
    out: Path = Path("writesae-out")
    """Folder for demo.html, the writes that were read, and the dictionaries."""

    def __post_init__(self) -> None:
        sizes = ("d_sae", "training_tokens", "eval_sequences")
        at_least(self, dict.fromkeys(sizes, 1) | {"seed": 0})


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Run a language model over a text once, and write the factors of the heads' recurrences to disk. Any number of
    dictionaries train from them, without the language model (`writesae train --collection OUT`).

    The size is said beforehand. The same command resumes where it was stopped or killed. Started several times, also on
    machines with a common folder, the commands share the work: `torchrun --nproc-per-node 8 -m writesae collect ...`
    starts one for each of eight GPUs."""

    model: str
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7)."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",))]
    """Recurrent layers."""
    heads: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--head",))] = ()
    """Heads of every layer; none named: all of them."""
    n_tokens: int | None = None
    """Tokens of text, rounded down to whole sequences; by default the whole text."""
    out: Path = Path("writesae-out/collection")
    """Folder of the collection."""
    targets: tuple[Target, ...] = ("write",)
    """What dictionaries will be trained on. States need reads, decays and erases besides the writes."""
    context_size: int = 128
    """Tokens per sequence."""
    dataset: str | None = None
    """Text file, folder of `.txt` files, or dataset with a column `text` on the hub or in a folder; by default the
    held-out text of this package, which is enough for the models that ship with it."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the stored vectors; auto: the smallest that is safe on a first batch."""
    model_dtype: Dtype = "float32"
    """The model's dtype."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one, and under torchrun each process has its own."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def __post_init__(self) -> None:
        at_least(self, {"n_tokens": 1, "context_size": 1})


SIZES = ("d_sae", "k", "training_tokens", "train_batch_size_tokens")
"""Sizes of a dictionary and of its training, among the flags of `Train`."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train dictionaries on heads of a model: every target, loss, variant and seed of every head that is named.

    Each dictionary is saved in OUT/L{layer}H{head}/{name}/sae, whole or not at all. The same command resumes where it
    was stopped or killed, and trains nothing twice. Started several times, the commands share the work: each takes the
    next dictionaries that none of them trains (`torchrun --nproc-per-node 8 -m writesae train ...`)."""

    model: str | None = None
    """Model on the hub, a folder, or one that ships with the package (embedded, embedded-mamba2, embedded-rwkv7). It
    runs once, for all dictionaries."""
    collection: str | Path | None = None
    """Instead of a model, a folder that `writesae collect`, `train`, `demo` or `reproduce` wrote; by default the
    model's is made in OUT/collection."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--layer",))] = ()
    """Recurrent layers; by default those of the collection."""
    heads: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--head",))] = ()
    """Heads of every layer; by default those of the collection."""
    targets: Annotated[tuple[Target, ...], tyro.conf.arg(aliases=("--target",))] = ("write",)
    """What dictionaries are trained on."""
    losses: Annotated[tuple[Loss, ...], tyro.conf.arg(aliases=("--loss",))] = ("mse",)
    """What they are trained for."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--variant",))] = ("WriteSAE",)
    """How they are built: of `sae_lens_writesae.VARIANTS`, or FlatSAE-matched, a flat SAE with as many parameters as
    the WriteSAE has."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0,)
    """Seeds of weights and data order."""
    metric: MetricName = "frobenius"
    """What errors are measured by: their squares, or the KL divergence that they cause in the model (gauss_newton, for
    writes alone). The latter is fitted to the model, which is loaded for it."""
    names: tuple[str, ...] = ()
    """Dictionaries by name, instead of targets, losses, variants, seeds and the metric: write-seed0
    state-reads-seed0 write-gauss_newton-seed0."""
    dataset: str | None = None
    """Text file, folder of `.txt` files, or dataset with a column `text` on the hub or in a folder; by default the
    held-out text of the package, which is enough for the models that ship with it."""
    architecture: str = "writesae_topk"
    """Architecture of the dictionaries, as SAELens names it."""
    d_sae: int = 2048
    """Atoms of a dictionary."""
    k: int = 1
    """Active atoms per token; architectures that have no k take no notice of it."""
    decoder_init: Literal["native", "random"] = "native"
    """Directions of the atoms before training: rows of the first batches, or random (the paper's)."""
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """Whether inputs are scaled to a mean norm of sqrt(d_in), as SAELens does it; the factor is folded in."""
    training_tokens: int = 256_000
    """Tokens that each dictionary is trained on; a shorter text is gone over again."""
    train_batch_size_tokens: int = 128
    """Rows of an optimizer step."""
    lr: float = 3e-3
    """Learning rate of Adam."""
    context_size: int = 1024
    """Tokens per sequence; that of a collection holds."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one, and under torchrun each process has its own."""
    out: Path = Path("writesae-out/saes")
    """Folder of the dictionaries."""
    summary: bool = True
    """End with a table of what the dictionaries recover on held-out text, for which the model is loaded again."""

    def __post_init__(self) -> None:
        once_each(self, ("layers", "heads"), ("targets", "losses", "variants", "seeds"))
        at_least(self, dict.fromkeys((*SIZES, "context_size"), 1) | {"seeds": 0})
        in_metric = [name for name in self.dictionaries() if name.metric != "frobenius"]
        refused = [str(name) for name in in_metric if not name.on_factors]
        one_source = (self.model is None) != (self.collection is None)
        expect(
            self, {"model": (one_source, "a model to be run over text, or a collection that it left; one of the two")}
        )
        has_heads = self.model is None or bool(self.layers and self.heads)
        expect(self, {"heads": (has_heads, "layers and heads of the model")})
        expect(self, {"metric": (not refused, f"frobenius, or writes instead of {', '.join(refused)}")})

    def dictionaries(self) -> list[DictionaryName]:
        """What is trained on each head."""
        if self.names:
            return [DictionaryName.parse(name) for name in self.names]
        names = []
        for combination in itertools.product(self.targets, self.losses, self.variants, self.seeds):
            name = DictionaryName(*combination, metric=self.metric)
            names.append(DictionaryName.parse(str(name)))  # which refuses a variant that is not there
        return names

    def check(self) -> None:
        """Raise ValueError where the collection is not there."""
        if self.collection is not None and "://" not in str(self.collection) and not Path(self.collection).is_dir():
            raise ValueError(f"collection: expected the folder of one, got {self.collection}, which does not exist")


@dataclass(frozen=True, kw_only=True)
class OnText:
    """Flags of commands that look at dictionaries on a text."""

    model: str | None = None
    """Model; by default the one named in the metadata of the SAE."""
    other_model: bool = False
    """Take dictionaries of other weights than the model's: of the model that it was fine-tuned from, say."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one."""
    text: Path | None = None
    """Text file; by default the held-out text of the package. `last`: the text that only the final run uses."""
    sequences: int = 100
    """Sequences to find firings in."""
    context_size: int = 128
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        at_least(self, {"sequences": 1, "context_size": 1})


@dataclass(frozen=True, kw_only=True)
class AtomSettings:
    """What is shown of each atom, and from how many firings; every setting is written to the data.

    Raises:
        ValueError: a setting is out of range; the message names the setting and its value.
    """

    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    n_atoms: int | None = 100
    """Atoms drawn uniformly from those with `min_firings`. None or 0: all of them."""
    min_firings: int = 4
    """An atom with fewer firings on the tokens has no page."""
    top: int = 12
    """Contexts with the largest activations. A firing that another context already shows is left out."""
    bands: int = 4
    """Equal shares of the firings, by activation, from which further contexts are drawn."""
    per_band: int = 3
    """Contexts drawn from each band."""
    before: int = 24
    """Tokens shown before a firing."""
    after: int = 10
    """Tokens shown after it."""
    n_tokens: int = 10
    """Tokens listed at each end of the key side and of the value side."""
    half_life_firings: int = 10
    """Firings of an atom after which its write is followed."""
    half_life_limit: int = 128
    """Longest half-life that is looked for, in tokens; at most half of a sequence."""
    effect_firings: int = 3
    """Firings of an atom at which its effect on the logits is measured. 0: not measured."""
    effect_horizon: int = 16
    """Effects are averaged over t..t+effect_horizon, both included."""
    quality: bool = True
    """Measure the dictionary as a whole; it can take longer than all atoms together."""
    seed: int = 0
    """Seed of all draws."""
    label: str = ""
    """Name of the dictionary on the pages; by default the head and the target."""

    def __post_init__(self) -> None:
        positive = ("min_firings", "top", "bands", "n_tokens", "half_life_firings", "half_life_limit")
        may_be_zero = ("effect_horizon", "n_atoms", "per_band", "before", "after", "effect_firings")
        at_least(self, {**dict.fromkeys(positive, 1), **dict.fromkeys(may_be_zero, 0)})


@dataclass(frozen=True, kw_only=True)
class OnAtoms(OnText):
    """Flags of commands that look at atoms of a dictionary."""

    sae: tyro.conf.Positional[Path]
    """Folder of a trained SAE (cfg.json, sae_weights.safetensors), or one that holds such folders, as `writesae train`
    and `demo` leave them: each SAE then gets a folder in `out`."""
    sequences: int = 200
    """Sequences to find firings in."""
    out: Path = Path("writesae-out/atoms")
    """Folder for what is written."""
    atoms: tyro.conf.OmitArgPrefixes[AtomSettings] = AtomSettings()

    def check(self) -> None:
        """Raise ValueError where there is no SAE."""
        sae_folders(self.sae)


@dataclass(frozen=True, kw_only=True)
class Show(OnAtoms):
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers
    are saved as JSON.
    """

    optional: bool = False
    """Where no atom can be shown, leave the reason in `out` and no error."""


@dataclass(frozen=True, kw_only=True)
class Export(OnAtoms):
    """Write the atoms of a dictionary to batch-0.json, as SAEDashboard writes it, for Neuronpedia's converter."""

    to: Literal["neuronpedia"] = "neuronpedia"
    """Which tool is to read it."""
    dataset: str = ""
    """What the text is called there."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Open a page on this machine: read a text, cut or replace what the model remembers of it, and ask why it answers.

    With a dictionary the page also shows which atoms fire. Needs no network. It answers to this machine alone, until it
    is interrupted.
    """

    model: tyro.conf.Positional[str | None] = None
    """Model; by default the one named in the SAE's metadata, or without an SAE the embedded one."""
    sae: Path | None = None
    """Folder of a dictionary, or one that holds such folders; the atoms of the first of each head are shown."""
    reader: Path | None = None
    """File of a reader of the model's memories (`MemoryReader.save`). By default one is fitted to text that ships with
    the package, when the page asks for it."""
    other_model: bool = False
    """Take dictionaries of other weights than the model's: of the model that it was fine-tuned from, say."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one."""
    port: int = 8765
    """Port of 127.0.0.1. 0: a free one."""

    def __post_init__(self) -> None:
        expect(self, {"port": (0 <= self.port < 2**16, f"0 to {2**16 - 1}")})

    def check(self) -> None:
        """Raise ValueError where a folder is named that holds no SAE."""
        if self.sae is not None:
            sae_folders(self.sae)


@dataclass(frozen=True)
class Push:
    """Publish dictionaries on the Hugging Face hub, with a card: their hooks, and the lines that load them.

    The repository is made if there is none. Each dictionary goes up in a commit, and the card after them; a card that
    is there is replaced. Log in first: `hf auth login`. For a private repository: `hf repos create NAME --private`.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of a dictionary, or one below which `writesae train`, `demo` or `reproduce` left some."""
    repo: tyro.conf.Positional[str]
    """Repository, OWNER/NAME."""
    dry_run: bool = False
    """Print the card, and upload nothing."""

    def check(self) -> None:
        """Raise ValueError where there is no SAE."""
        sae_folders(self.folder)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models on this machine, those that ship with the package first, and the model types that can be hooked.
    No weights are read, and nothing is asked of the hub. With --cost: the bytes that hooks of one model hold."""

    cost: str | None = None
    """Instead of the list, what hooks, states and memories of this model hold: a name on the hub, a folder, or one that
    ships with the package. Its configuration is read, and no weights."""
    tokens: int = 1024
    """With --cost: length of the sequence."""
    dtype: Dtype = "float32"
    """With --cost: of the weights."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """List the hooks of a model in order of execution, with the shape of each activation. B: sequences, T: tokens. No
    weights are read."""

    model: tyro.conf.Positional[str]
    """Model on the hub, a folder, or one that ships with the package."""
    layer: int | None = None
    """Only this layer, with its hooks spelt out; by default all layers, those that are alike together."""
