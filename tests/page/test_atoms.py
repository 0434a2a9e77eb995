"""Atom pages: exact on planted dictionaries, whole as JSON, and sound as pages."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent
from page.planted_atoms import HEAD, HOOK, LAYER, SMALL, empty_sae, matrix, places
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.flags import AtomSettings, Show
from writesae.page.atoms import AtomPagesData, write_atom_pages
from writesae.page.atoms.data import TokenValue
from writesae.page.atoms.measure import AtomFacts
from writesae.page.atoms.pages import heatmap
from writesae.page.atoms.text import TokenTexts, token_bytes, visible
from writesae.show import run_show


def test_a_planted_write_is_found_where_it_was_taken(
    model: HookedRecurrent, tokens: Tensor, data: AtomPagesData
) -> None:
    recurrence = model.recurrence(tokens, LAYER)
    assert [page.atom for page in data.atoms] == list(range(6))
    for page, (s, t) in zip(data.atoms, places()):
        size = float((recurrence.k[s, t, HEAD].norm() * recurrence.u[s, t, HEAD].norm()).detach())
        every = [c for band in page.bands for c in band.contexts]
        assert len(every) == page.n_firings and page.top[0].values[page.top[0].at] == max(c.values[c.at] for c in every)
        (own,) = [c for c in every if (c.sequence, c.position) == (s, t)]
        assert own.cosine == pytest.approx(1, abs=1e-3) and own.values[own.at] == pytest.approx(size, rel=1e-3)
        assert own.tokens == [model.to_string(int(i)) for i in tokens[s, t - own.at : t + SMALL.after + 1]]
        assert own.at == min(t, SMALL.before)
        assert page.keys.median is not None and page.keys.median > 0  # also for the turned one


def test_counts_are_those_of_the_encoder(
    planted: WriteTopKSAE, model: HookedRecurrent, tokens: Tensor, data: AtomPagesData
) -> None:
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = planted.encode(cache[HOOK].float()) > 0  # [N,T,F]
    for page in data.atoms:
        here = active[..., page.atom]
        assert page.n_firings == here.sum() and page.rate == pytest.approx(float(here.float().mean()))
        after = here.roll(-1, 1)  # what comes before each firing
        after[:, -1] = False
        for listed, where in ((page.fires_on, here), (page.fires_after, after)):
            counts = Counter(tokens[where].tolist())
            assert {each.token: each.n for each in listed}.items() <= counts.items()
            assert listed[0].n == max(counts.values())
            assert listed[0].value == pytest.approx(listed[0].n / page.n_firings, rel=1e-3)


def test_the_token_before_is_named_where_it_says_more(data: AtomPagesData) -> None:
    """An atom that fires at every word after " the", and one that fires at " the"."""
    the = TokenValue(1, " the", 0.75, 75)
    words = [TokenValue(n, text, 0.02, 2) for n, text in enumerate((" part", " year", " war"), 2)]
    page = data.atoms[0]
    assert replace(page, fires_on=words, fires_after=[the]).after
    assert not replace(page, fires_on=[the], fires_after=words).after


def test_key_side_is_the_mean_cosine_by_token(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData
) -> None:
    keys = normalize(model.recurrence(tokens, LAYER).k[:, :, HEAD], dim=-1)
    for page in data.atoms[:2]:
        v = normalize(planted.v[page.atom, 0].double(), dim=-1) * (-1 if page.atom == 1 else 1)
        for listed in page.keys.tokens.high[:3] + page.keys.tokens.low[:3]:
            here = tokens == listed.token
            assert listed.n == here.sum() >= 3
            assert listed.value == pytest.approx(float((keys[here] @ v).mean().detach()), abs=1e-3)
        values = [t.value for t in page.keys.tokens.high]
        assert values == sorted(values, reverse=True) and values[0] > page.keys.tokens.low[0].value


def test_value_side_is_the_direct_path(model: HookedRecurrent, planted: WriteTopKSAE, data: AtomPagesData) -> None:
    page = data.atoms[0]
    w = normalize(planted.w[0, 0].double(), dim=-1)
    path = w @ model.layer_W_O(LAYER)[HEAD] @ model.W_U
    path = (path - path.mean()).detach()
    high, low = page.values.tokens.high[0], page.values.tokens.low[0]
    assert (high.token, low.token) == (int(path.argmax()), int(path.argmin()))
    assert high.value == pytest.approx(float(path.max()), rel=1e-3)


def test_effect_is_the_derivative_that_autograd_finds(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One firing, all first-order paths, at every listed token."""
    monkeypatch.setattr("writesae.page.atoms.measure.STEP", 1e-3)
    facts = AtomFacts(replace(SMALL, atoms=(0,), effect_firings=1), model, planted, tokens)
    (mean,), n = facts.effects
    ((s, [(_, t, _)]),) = facts._sampled_firings(1, SMALL.effect_horizon, stream=1)
    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    atom = matrix(planted, 0)

    def add(write: Tensor, hook: object) -> Tensor:
        changed = write.clone()
        changed[0, t] = write[0, t] + amount * write[0, t].detach().norm() * atom / atom.norm()
        return changed

    logits = model.run_with_hooks(tokens[s : s + 1], fwd_hooks=[(HOOK.replace("_vec", ""), add)])
    means = logits[0, t : t + SMALL.effect_horizon + 1].mean(0)
    means = means - means.mean()
    assert n == 1 and np.abs(mean).max() > 0
    for token in (*mean.argsort()[:3], *mean.argsort()[-3:]):
        (slope,) = torch.autograd.grad(means[token], amount, retain_graph=True)
        assert mean[token] == pytest.approx(float(slope), rel=2e-3)


def test_half_life_is_that_of_the_state_which_the_atom_alone_leaves(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    """On one atom, whose firings with 24 tokens after them are all followed."""
    facts = AtomFacts(replace(SMALL, half_life_firings=1000), model, planted, tokens)
    limit = tokens.shape[1] // 2
    recurrence = model.recurrence(tokens, LAYER).select(heads=slice(HEAD, HEAD + 1))
    lives = []
    for s, t in facts.rows(2)[["sequence", "position"]].query(f"position < {limit}").to_numpy():
        k, u = torch.zeros_like(recurrence.k), torch.zeros_like(recurrence.u)
        k[s, t], u[s, t] = planted.v[2].double(), planted.w[2].double()
        states = recurrence.with_write(k, u).states()[s, t : t + limit + 1, 0]
        sizes = torch.linalg.matrix_norm(states)
        gone = (sizes < sizes[0] / 2).nonzero()[:, 0].tolist()
        lives.append(min([*gone, limit]))
    assert facts.half_lives[2] == lives and len(lives) > 1


def test_an_atom_is_shown_as_a_matrix(planted: WriteTopKSAE, data: AtomPagesData) -> None:
    for page in data.atoms:
        (term,) = page.terms
        np.testing.assert_allclose(term.size * np.outer(term.key, term.value), matrix(planted, page.atom), atol=2e-4)
        with Image.open(io.BytesIO(base64.b64decode(heatmap(page.terms).split("base64,")[1].split('"')[0]))) as image:
            drawn = np.asarray(image.convert("RGBA"), float)
        assert drawn.shape[:2] == (len(term.key), len(term.value))
        signs = np.where(drawn[..., 2] > drawn[..., 0], 1, -1)  # blue or orange
        dense = matrix(planted, page.atom).numpy()
        np.testing.assert_allclose(signs * drawn[..., 3] / 255, dense / np.abs(dense).max(), atol=0.04)


def test_a_flat_atom_shows_its_largest_singular_terms(model: HookedRecurrent, tokens: Tensor, tmp_path: Path) -> None:
    sae = empty_sae(model, decoder="flat")
    torch.nn.init.normal_(sae.W_dec)
    data = replace(SMALL, quality=False, effect_firings=0).collect(model, sae, tokens)
    page = data.atoms[0]
    sigma = torch.linalg.svdvals(sae.W_dec[page.atom].detach().view(-1, len(page.terms[0].value)))
    shares = (sigma**2 / (sigma**2).sum()).tolist()[:4]
    assert [term.share for term in page.terms] == pytest.approx(shares, rel=1e-4)
    assert "leading term" in write_atom_pages(data, tmp_path).with_name(f"atom-{page.atom}.html").read_text()
    assert page.effect is None and data.info["quality"] is None  # what is not asked for is not measured
    ends = [page.values.tokens.low[0].value, page.values.tokens.high[0].value]
    assert [page.logits.edges[0], page.logits.edges[-1]] == pytest.approx(ends, rel=1e-3)


def test_the_numbers_are_written_with_pages_that_need_nothing_else(data: AtomPagesData, site: Path) -> None:
    numbers = json.loads((site / "data.json").read_text())
    assert numbers["info"]["hook_name"] == HOOK
    assert numbers["atoms"][1:] == json.loads(json.dumps(asdict(data)["atoms"][1:]))
    pages = sorted(site.glob("*.html"))
    assert len(pages) == 1 + len(data.atoms) and max(page.stat().st_size for page in pages) < 100_000
    for page in pages:
        links = re.findall(r'(?:src|href)="([^"]*)"', page.read_text())
        assert all((site / link).exists() for link in links if not link.startswith(("#", "data:image/png")))
    onward = [re.findall(r'rel="next" href="([^"]*)"', page.read_text()) for page in pages]
    assert onward == [*([page.name] for page in pages[1:-1]), [], []]  # from each atom to the next; index.html is last


def test_a_token_is_exact_as_data_and_visible_on_a_page(model: HookedRecurrent) -> None:
    assert TokenTexts(model)[model.to_single_token(" the")] == " the"
    assert visible(" a\tb\n\u200b") == "·a⇥b↵⟨U+200B⟩"


def test_bytes_that_are_no_text_are_shown_as_bytes(model: HookedRecurrent) -> None:
    """Part of a character is a token of its own in a byte-level vocabulary; decoded, all such tokens look alike."""
    texts, parts = TokenTexts(model), model.to_tokens("€", prepend_bos=False)[0].tolist()
    assert [texts[token] for token in parts] == ["⟨E2⟩", "⟨82⟩", "⟨AC⟩"]
    named = SimpleNamespace(convert_ids_to_tokens={0: "<0xE2>", 1: "Ġthe", 2: "▁the"}.__getitem__)
    assert [token_bytes(named, token) for token in range(3)] == [b"\xe2", b" the", None]


def test_an_atom_that_does_not_fire_often_enough_is_named(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"\[99\]"):
        replace(SMALL, atoms=(0, 99)).collect(model, planted, tokens)


def test_atoms_that_are_zero_have_no_page(model: HookedRecurrent, tokens: Tensor) -> None:
    silent = empty_sae(model)
    silent.b_enc.data += 1  # everything fires, but nothing is written
    silent.v.data[:] = 0
    with pytest.raises(NothingToMeasureError):
        SMALL.collect(model, silent, tokens)


def test_where_a_page_is_optional_it_says_why_there_is_none(planted: WriteTopKSAE, tmp_path: Path) -> None:
    planted.save_model(str(tmp_path / "sae"))
    few = AtomSettings(min_firings=999, quality=False)
    shown = run_show(Show(sae=tmp_path / "sae", sequences=4, context_size=48, atoms=few, optional=True, out=tmp_path))
    assert "999" in Path(shown).read_text()


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="got 10"):
        TokenTexts(cast(HookedRecurrent, SimpleNamespace(tokenizer=range(10), W_U=torch.zeros(3, 5))))
