"""SAELens' own verbs for what it saves, as SAELens documents them, on every architecture: a run and its checkpoints,
`SAE.load_from_disk`, `TrainingSAE.load_from_disk`, `SAE.from_pretrained`, `save_model`, `save_inference_model`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from sae_lens import SAE, LanguageModelSAETrainingRunner, TrainingSAE
from saes import runner_config
from torch import Tensor
from torch.testing import assert_close

from hookpoints import embedded as shipped
from sae_lens_writesae import load_sae, text_dataset
from sae_lens_writesae.sae import TRAINING

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

K, V, F = 64, 32, 16
HOOK = "blocks.2.mixer.heads.1.hook_{}_vec"
CASES = [
    *((name, "write", 1) for name in TRAINING),
    ("writesae_batchtopk", "state", 2),
]
FIELDS: dict[str, dict[str, Any]] = {
    "writesae_topk": {"k": 4},
    "writesae_batchtopk": {"k": 4},
    "writesae_matryoshka": {"k": 4, "matryoshka_widths": [8, F]},
    "writesae_jumprelu": {"jumprelu_init_threshold": 0.01},
    "writesae_matching_pursuit": {"k": 2},
}
OF_BATCHES = ("writesae_batchtopk", "writesae_matryoshka")
"""Which atoms are active depends on the batch in training, and on a threshold after it."""


class Run(NamedTuple):
    """What a run of SAELens left."""

    sae: Any
    """The autoencoder that it returned, still of its training class."""
    checkpoints: list[Path]
    """One from the middle, and the last one."""
    exported: Path
    rows: Tensor
    """[N,K*V] of the head on a text."""


@pytest.fixture(scope="module")
def run(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Run]:
    """Runs SAELens' runner once for each case."""
    text = text_dataset(shipped.text("train")[:20_000])
    tokens = embedded.to_tokens(shipped.text("test")[:400])

    @cache
    def of_case(architecture: str, target: str, rank: int) -> Run:
        hook, folder = HOOK.format(target), tmp_path_factory.mktemp(architecture)
        config_class = TRAINING[architecture][1]
        sizes: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": F, "rank": rank}
        cfg = runner_config(
            config_class(**sizes | FIELDS.get(architecture, {})),
            8,
            32,
            model_name="embedded",
            model_class_name="HookedRecurrent",
            hook_name=hook,
            context_size=32,
            store_batch_size_prompts=2,
            n_batches_in_buffer=4,
            prepend_bos=False,
            sequence_separator_token=None,
            streaming=False,
            lr=3e-3,
            n_checkpoints=1,
            save_final_checkpoint=True,
            checkpoint_path=str(folder / "runs"),
            output_path=str(folder / "exported"),
        )
        torch.manual_seed(0)
        sae = LanguageModelSAETrainingRunner(cfg, override_model=embedded, override_dataset=text).run()
        with torch.no_grad():
            _, activations = embedded.run_with_cache(tokens, names_filter=hook)
        checkpoints = sorted(Path(str(cfg.checkpoint_path)).iterdir())  # a number, and final_...
        return Run(sae, checkpoints, folder / "exported", activations[hook][0].flatten(1))

    return of_case


def same(one: Any, other: Any, rows: Tensor, tolerance: float = 1e-5) -> None:
    """Equal codes and reconstructions, as far as float32 tells."""
    with torch.no_grad():
        codes, reconstructions = one.encode(rows), one(rows)
        assert codes.count_nonzero() > 0
        assert_close(other.encode(rows), codes, rtol=tolerance, atol=tolerance * float(codes.abs().max()))
        assert_close(other(rows), reconstructions, rtol=tolerance, atol=tolerance * float(rows.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_load(case: tuple[str, str, int], run: Any, tmp_path: Path) -> None:
    """As they were in training, and for inference, where they are what an export at that step would be."""
    _, checkpoints, exported, rows = run(*case)
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        in_training: Any = TrainingSAE.load_from_disk(checkpoint)
        loaded = SAE.load_from_disk(checkpoint)
        assert not isinstance(loaded, TrainingSAE)
        if case[0] not in OF_BATCHES:
            same(in_training, loaded, rows)
        same(load_sae(checkpoint), loaded, rows, 0)
        assert type(load_sae(checkpoint, training=True)) is type(in_training)
        in_training.save_inference_model(tmp_path)
        same(SAE.load_from_disk(tmp_path), loaded, rows)
    same(SAE.load_from_disk(exported), SAE.load_from_disk(checkpoints[-1]), rows)


@pytest.mark.parametrize("case", CASES[-2:], ids=str)
def test_a_release_on_this_disk_loads(
    case: tuple[str, str, int], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SAE.from_pretrained` by repository and folder, from the cache of the hub, without a network."""
    _, checkpoints, exported, rows = run(*case)
    repository, commit = tmp_path / "models--me--saes", "0" * 40
    for name, folder in (("exported", exported), ("checkpoint", checkpoints[-1])):
        shutil.copytree(folder, repository / "snapshots" / commit / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("exported", "checkpoint"):
        same(SAE.load_from_disk(exported), SAE.from_pretrained("me/saes", name), rows)
