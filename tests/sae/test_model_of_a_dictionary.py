"""Dictionaries know their model: where it is, which weights it has, and that other weights are another model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from hookpoints import HookedRecurrent, UnknownModelError, attribute, zoo
from hookpoints.errors import InputError, OtherModelWarning
from sae_lens_writesae import HookedSAERecurrent, collect, load_sae, train, training_config
from sae_lens_writesae.sae.load import model_of
from writesae.cli import main
from writesae.experiment.lab import Lab

SIZES: dict[str, Any] = {"d_sae": 8, "sae": {"k": 2}, "training_tokens": 64, "train_batch_size_tokens": 32}
LAYER, HEAD = 1, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `byo/recall`, and a dictionary in `sae` that was trained where the model's name was relative."""
    root = tmp_path_factory.mktemp("home")
    shutil.copytree(zoo.path("recall"), root / "byo" / "recall")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        model = HookedRecurrent.from_pretrained("byo/recall")
        tokens = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
        collection = collect(model, tokens, [LAYER], [HEAD], root / "collection", progress=False)
        for source in (collection, model):
            cfg = training_config(source, LAYER, HEAD, **SIZES)
            assert cfg.model_name == str(root / "byo" / "recall")
            assert cfg.sae.metadata.model_fingerprint == model.fingerprint()
        train(training_config(collection, LAYER, HEAD, **SIZES)).save_inference_model(root / "sae")
    return root


@pytest.fixture
def fine_tuned(folder: Path) -> HookedRecurrent:
    model = HookedSAERecurrent.from_pretrained(str(folder / "byo" / "recall"))
    with torch.no_grad():
        next(model.hf_model.parameters())[3, 3] += 1
    return model


def test_weights_have_one_name_in_every_dtype_that_tells_them(folder: Path) -> None:
    place = str(folder / "byo" / "recall")
    names = [HookedRecurrent.from_pretrained(place, dtype=dtype).fingerprint() for dtype in ("float32", "bfloat16")]
    assert names[0] == names[1] and names[0]
    assert HookedRecurrent.from_pretrained(place, dtype="float16").fingerprint() is None
    assert HookedRecurrent.from_pretrained(place, device="meta").fingerprint() is None


def test_a_dictionary_finds_its_model_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sae = load_sae(folder / "sae")
    model = HookedRecurrent.from_pretrained(str(folder / "byo" / "recall"))
    assert model_of([sae]).fingerprint() == sae.cfg.metadata.model_fingerprint == model.fingerprint()
    SAE.load_from_disk(folder / "sae").save_model(tmp_path / "again")  # SAELens' own loading and saving
    assert SAE.load_from_disk(tmp_path / "again").cfg.metadata.model_fingerprint == model.fingerprint()
    sae.cfg.metadata.model_name = str(folder / "byo" / "gone")
    with pytest.raises(UnknownModelError, match=r"byo/gone.*no name on the hub"):
        model_of([sae])


@pytest.mark.parametrize(
    "use",
    [
        lambda model, sae: model.run_with_saes(torch.arange(1, 9)[None], saes=[sae]),
        lambda model, sae: attribute(torch.arange(1, 9)[None], model, [5], measure=1, targets=1, saes=[sae]),
        lambda model, sae: Lab(model, {"": sae}, torch.arange(1, 49).view(2, 24)),
    ],
)
def test_calls_warn_of_other_weights(
    folder: Path, fine_tuned: HookedRecurrent, use: Callable[[HookedRecurrent, Any], object]
) -> None:
    sae = load_sae(folder / "sae")
    with pytest.warns(OtherModelWarning, match=r"expected a dictionary of the weights of .*recall, got one of"):
        use(fine_tuned, sae)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherModelWarning)
        use(HookedSAERecurrent.from_pretrained(str(folder / "byo" / "recall")), sae)


def test_commands_refuse_other_weights_unless_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another family with heads of the same sizes, and of other weights that took the place of its own."""
    changed = shutil.copytree(zoo.path("recall-rwkv7"), tmp_path / "recall")
    few = ["--model", str(changed), "--sequences", "2", "--context-size", "16", "--out", str(tmp_path / "out")]
    sae = str(folder / "sae")
    for command in ("show", "export"):
        with pytest.raises(SystemExit):
            main([command, sae, *few])
        assert "error: sae: expected a dictionary of the weights of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.warns(OtherModelWarning):
        model_of([load_sae(sae)], str(changed), other_model=True).check_dictionary(load_sae(sae).cfg.metadata)
    with pytest.raises(InputError):
        model_of([load_sae(sae)], str(changed))
