"""The runs behind the published numbers: rows of `runs.toml` as commands, and those that are no command. Paths are
those in the folder of the runs, which `published.smk` works in."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent
    from writesae_study.experiment.evaluation import Evaluation

RUNS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("runs.toml").read_text(encoding="utf-8"))
_SEQUENCES = 48
"""Held-out sequences of 128 tokens on which dictionaries are evaluated."""


class Place(NamedTuple):
    """A head of a model."""

    model: str
    layer: int
    head: int

    @property
    def cell(self) -> str:
        """As folders are called."""
        return f"L{self.layer}H{self.head}"


def places(groups: Sequence[str]) -> list[Place]:
    """The heads of some groups."""
    heads = []
    for group in groups:
        for name in RUNS["heads"][group]:
            model, layer, head = name.split(":")
            heads.append(Place(model, int(layer), int(head)))
    return heads


def collecting(model: str) -> list[str]:
    """Arguments of `writesae` for the only pass of a model over the training text."""
    cells = RUNS["collect"][model]
    where = ["--layers", *map(str, cells["layers"]), "--heads", *map(str, cells["heads"])]
    folder = f"saes/{model}/default/collection"
    return ["collect", "--model", model, *where, "--targets", "write", "state", "--out", folder]


def command_lines(run: Mapping[str, Any], place: Place) -> Iterator[list[str]]:
    """Arguments of `writesae` for a run at one of its heads, in order."""
    for recipe, names in run["train"].items():
        yield training(place, recipe, names)
    for asked in run["ask"]:
        yield asking(place, asked)


def training(place: Place, recipe: str, names: Sequence[str]) -> list[str]:
    """The command that trains dictionaries of one head."""
    saes = Path("saes", place.model)
    flags = RUNS["recipes"][recipe].format(saes=saes).split()
    sizes = [word for name, size in RUNS["sizes"].items() for word in (f"--{name}", str(size))]
    where = ["--layers", str(place.layer), "--heads", str(place.head), "--out", str(saes / recipe)]
    return ["train", *flags, "--names", *names, *where, *sizes]


def asking(place: Place, question: Mapping[str, Any]) -> list[str]:
    """The command that asks some questions about dictionaries of one head."""
    saes = Path("saes", place.model)
    recipe = question["name"].partition("-")[0]
    of = [str(saes / recipe / place.cell / name / "sae") for name in question["of"]]
    where = ["--collection", str(saes / "default" / "collection")]
    results = ["--out", f"runs/{question['name']}/{place.model}/{place.cell}"]
    text = ["--text", question["text"]] if "text" in question else []
    controls = "--control-dictionaries" if question["controls"] else "--no-control-dictionaries"
    settings = []
    for kind in question["kinds"]:
        for field, value in RUNS["settings"].get(kind, {}).items():
            settings.append(f"{kind}.{field}={json.dumps(value)}")
    asked = ["--kinds", *question["kinds"], controls, *(["--set", *settings] if settings else [])]
    return ["eval", "all", *of, "--resume", "--sequences", str(_SEQUENCES), *where, *results, *text, *asked]


def question(kind: str) -> Evaluation:
    """A question with the settings that it has in every run."""
    from writesae_study.evaluations import EVALUATIONS

    return EVALUATIONS[kind].from_dict(RUNS["settings"].get(kind, {}))


def without_learning(place: Place, tests: Sequence[Evaluation]) -> None:
    """Questions about atoms where nothing was learned: the model is shuffled, and a dictionary of the size of those
    that are trained has random atoms, or writes of the shuffled model that are drawn at random. A claim that holds
    here is not about what a model or a dictionary learned. Results that exist stay. Some minutes of one core."""
    from hookpoints import embedded
    from sae_lens_writesae import training_config
    from sae_lens_writesae.sae.rows import new_sae
    from writesae import sample_sequences
    from writesae_study.dictionary.controls import control_dictionaries
    from writesae_study.experiment.terms import Terms

    name, layer, head = place
    folders = {
        (control, test): Path("runs", control, name, place.cell, test.kind, "write-seed0")
        for test in tests
        for control in RUNS["nulls"]
    }
    if all(folder.exists() for folder in folders.values()):
        return
    # The shuffled model, its text, and dictionaries of the size of the trained ones.
    model = shuffled_model(name)
    terms = Terms(model, sample_sequences(model, embedded.text("train"), 128, 160))
    tokens = sample_sequences(model, embedded.text("test"), 128, _SEQUENCES)
    size = {"d_sae": RUNS["sizes"]["d-sae"], "training_tokens": 128, "context_size": 8, "verbose": False}
    cfg = training_config(model, layer, head, architecture="writesae_topk", sae={"k": 32}, **size)
    made = control_dictionaries(model, {"write-seed0": new_sae(cfg)}, terms)
    for (control, test), folder in folders.items():
        if not folder.exists():
            sae = made[RUNS["nulls"][control]["control"]]["write-seed0"]
            result = test.run(model, sae, tokens, reference=terms, progress=False, or_skip=True)
            result.info["model"] = name
            result.save(folder)
            print(name, test.kind, control, [claim.outcome for claim in result.claims()], flush=True)


def shuffled_model(name: str, seed: int = 0) -> HookedRecurrent:
    """A model of the package whose numbers are permuted within each parameter."""
    import torch

    from hookpoints import HookedRecurrent

    model = HookedRecurrent.from_pretrained(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.data.copy_(parameter.flatten()[order].view_as(parameter))
    return model
