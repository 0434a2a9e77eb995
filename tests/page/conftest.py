"""Fixtures of pages that several files open."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hookpoints import HookedRecurrent, MemoryReader
from hookpoints import embedded as shipped
from page.planted_atoms import SMALL, N, T, empty_sae, planted_sae
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.flags import Prompt
from writesae.page.atoms import AtomPagesData, write_atom_pages
from writesae.page.prompt import PromptServer


@pytest.fixture(scope="session")
def folder(embedded: HookedRecurrent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SAE."""
    path = tmp_path_factory.mktemp("prompt") / "sae"
    empty_sae(embedded).save_model(path)
    return path


@contextmanager
def serving(flags: Prompt) -> Iterator[PromptServer]:
    """The prompt page, served."""
    with PromptServer(flags) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[PromptServer]:
    """Of a model with a dictionary."""
    with serving(Prompt(sae=folder, port=0)) as started:
        yield started


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    """Of a model that answers questions, with a reader that was saved."""
    told = HookedRecurrent.from_pretrained("facts-english")
    file = tmp_path_factory.mktemp("reader") / "reader.safetensors"
    MemoryReader.fit(told, shipped.text("train")[:20_000], context=64, longest=8).save(file)
    with serving(Prompt(model="facts-english", reader=file, port=0)) as started:
        yield started


@pytest.fixture(scope="session")
def model() -> HookedRecurrent:
    """The embedded model in float64 throughout, so that derivatives can be compared."""
    return HookedRecurrent.from_pretrained("embedded", dtype=torch.float64, backend="recurrence", device="cpu")


@pytest.fixture(scope="session")
def tokens(model: HookedRecurrent) -> Tensor:
    """[N,T] tokens."""
    return model.to_tokens(shipped.text("test")[:3000])[0, : N * T].view(N, T)


@pytest.fixture(scope="session")
def planted(model: HookedRecurrent, tokens: Tensor) -> WriteTopKSAE:
    """Atoms that are native writes of known tokens."""
    return planted_sae(model, tokens)


@pytest.fixture(scope="session")
def data(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor) -> AtomPagesData:
    """What their pages show."""
    return SMALL.collect(model, planted, tokens)


@pytest.fixture(scope="session")
def site(data: AtomPagesData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their pages; of atom 0 some things were not measured."""
    atoms = [replace(data.atoms[0], cosine=None, effect=None), *data.atoms[1:]]
    return write_atom_pages(AtomPagesData(data.info, atoms), tmp_path_factory.mktemp("site")).parent
