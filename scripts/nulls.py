"""Questions about atoms where nothing was learned: `python scripts/nulls.py FOLDER`.

All weights of a model are shuffled, each parameter by itself. A dictionary has random atoms, or writes of the shuffled
model that are drawn at random. FOLDER/runs/untrained-shuffled and FOLDER/runs/native-shuffled get the results; what
exists stays. A claim that holds here is not about what a model or a dictionary learned. Ten minutes of one core.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path

import torch
from equal_bits import HEADS
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import training_config
from sae_lens_writesae.sae.rows import new_sae
from writesae import sample_sequences
from writesae.dictionary.controls import Control, control_dictionaries
from writesae.evaluations.erasure import Erasure
from writesae.evaluations.logit_change import LogitChange
from writesae.evaluations.multistep import Multistep
from writesae.evaluations.partition import Partition
from writesae.evaluations.sign import Sign
from writesae.evaluations.substitution import Substitution
from writesae.experiment.terms import Terms

TESTS = (
    LogitChange(n_atoms=12),
    Sign(n_positions=48),
    Partition(),
    Multistep(n_atoms=12),
    Substitution(n_atoms=24, firings_per_atom=4, atom_choice=("dominant",)),
    Erasure(n_atoms=12),
)
"""With the settings of `scripts/results.sh`."""
FOLDERS: dict[Control, str] = {"untrained": "untrained-shuffled", "native writes": "native-shuffled"}


def shuffled(name: str, seed: int = 0) -> HookedRecurrent:
    """A model of the package whose numbers are permuted within each parameter."""
    model = HookedRecurrent.from_pretrained(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.data.copy_(parameter.flatten()[order].view_as(parameter))
    return model


@cache
def subject(name: str) -> tuple[HookedRecurrent, Terms, Tensor]:
    """A shuffled model, the text that its dictionaries are made from, and held-out tokens."""
    model = shuffled(name)
    text, tokens = (
        sample_sequences(model, embedded.text(part), 128, count) for part, count in (("train", 160), ("test", 48))
    )
    return model, Terms(model, text), tokens


@cache
def dictionaries(name: str, layer: int, head: int) -> Mapping[Control, Mapping[str, SAE]]:
    """An untrained dictionary and one of native writes, of the size of those that are trained."""
    model, terms, _ = subject(name)
    size = {"d_sae": 256, "training_tokens": 128, "context_size": 8, "verbose": False}
    cfg = training_config(model, layer, head, architecture="writesae_topk", sae={"k": 32}, **size)
    return control_dictionaries(model, {"write-seed0": new_sae(cfg)}, terms)


def main(folder: Path) -> None:
    """Run what is not there, on the first head of each model."""
    for test, (name, ((layer, head), *_)) in product(TESTS, HEADS.items()):
        model, terms, tokens = subject(name)
        for control, folder_name in FOLDERS.items():
            place = folder / "runs" / folder_name / name / f"L{layer}H{head}" / test.kind / "write-seed0"
            if not place.exists():
                sae = dictionaries(name, layer, head)[control]["write-seed0"]
                result = test.run(model, sae, tokens, reference=terms, progress=False, or_skip=True)
                result.info["model"] = name
                result.save(place)
                print(name, test.kind, control, [each.outcome for each in result.claims()], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
