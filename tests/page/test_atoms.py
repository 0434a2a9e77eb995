"""Atom pages: exact on planted dictionaries, whole as JSON, and sound as pages."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from planted_atoms import HEAD, HOOK, LAYER, SMALL, T, empty_sae, float64_model, held_out, matrix, places, planted_sae
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.evaluations.readers import Readers
from writesae.evaluations.substitution import Substitution
from writesae.experiment.at_firings import wide_firings
from writesae.experiment.evaluation import Result
from writesae.experiment.quality import dictionary_quality
from writesae.page.atoms import AtomPage, AtomPages, AtomPagesData, write_atom_pages
from writesae.page.atoms.collect import memory
from writesae.page.atoms.data import Context, TokenValue
from writesae.page.atoms.measure import Facts
from writesae.page.atoms.pages import heatmap
from writesae.page.atoms.text import TokenTexts, visible
from writesae.show import Show, run_show
from writesae.verdict.format import percent


@pytest.fixture(scope="module")
def model() -> HookedRecurrent:
    return float64_model()


@pytest.fixture(scope="module")
def tokens(model: HookedRecurrent) -> Tensor:
    return held_out(model)


@pytest.fixture(scope="module")
def planted(model: HookedRecurrent, tokens: Tensor) -> WriteTopKSAE:
    return planted_sae(model, tokens)


@pytest.fixture(scope="module")
def data(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor) -> AtomPagesData:
    return SMALL.collect(model, planted, tokens, progress=False)


@pytest.fixture(scope="module")
def tested(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor) -> Result:
    """A substitution test whose headline is about other atoms than those that fire."""
    settings = {
        "scales": ("matched", "coefficient"),
        "controls": ("random", "state", "pca", "state_after"),
        "horizon": 4,
    }
    test = Substitution(**settings, mean_write_sequences=1, firings_per_atom=3)
    return test.run(model, planted, tokens, progress=False)


def render(data: AtomPagesData, page: AtomPage, folder: Path) -> str:
    return write_atom_pages(data, folder).pages[page.atom].read_text()


def test_a_planted_write_is_found_where_it_was_taken(
    model: HookedRecurrent, tokens: Tensor, data: AtomPagesData
) -> None:
    recurrence = model.recurrence(tokens, LAYER)
    assert [page.atom for page in data.atoms] == list(range(6))
    for page, (s, t) in zip(data.atoms, places()):
        size = float((recurrence.k[s, t, HEAD].norm() * recurrence.u[s, t, HEAD].norm()).detach())
        every = [c for band in page.bands for c in band.contexts]
        assert len(every) == page.n_firings and page.top[0].activation == max(c.activation for c in every)
        (own,) = [c for c in every if (c.sequence, c.position) == (s, t)]
        assert own.cosine == pytest.approx(1, abs=1e-3) and own.activation == pytest.approx(size, rel=1e-3)
        assert own.tokens == [model.to_string(int(i)) for i in tokens[s, own.first : t + SMALL.after + 1]]
        assert own.first == max(0, t - SMALL.before) and own.at == t - own.first
        assert page.cosines is not None and page.cosines.at_firings.n == page.n_firings
        assert page.keys.at_firings is not None and page.keys.at_firings.median > 0  # also for the turned one


def test_counts_are_those_of_the_encoder(
    planted: WriteTopKSAE, model: HookedRecurrent, tokens: Tensor, data: AtomPagesData
) -> None:
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = planted.encode(cache[HOOK].float()) > 0  # [N,T,F]
    for page in data.atoms:
        here = active[..., page.atom].numpy()
        assert page.n_firings == here.sum() and page.rate == pytest.approx(here.mean())
        edges = np.array(page.positions.edges, dtype=int)
        rates = [here[:, a:b].mean() for a, b in itertools.pairwise(edges)]
        np.testing.assert_allclose(page.positions.values, rates)
        fired, counts = np.unique(tokens.numpy()[here], return_counts=True)
        assert page.fires_on[0].n == counts.max() and page.fires_on[0].token in fired
    assert sum(page.n_firings for page in data.atoms) == active.sum()


def test_key_side_is_the_mean_cosine_by_token(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData
) -> None:
    keys = normalize(model.recurrence(tokens, LAYER).k[:, :, HEAD], dim=-1)
    for page in data.atoms[:2]:
        v = normalize(planted.v[page.atom, 0].double(), dim=-1) * (-1 if page.atom == 1 else 1)
        for listed in page.keys.tokens.high[:3] + page.keys.tokens.low[:3]:
            here = tokens == listed.token
            assert listed.n == here.sum() >= SMALL.min_token_count
            assert listed.value == pytest.approx(float((keys[here] @ v).mean().detach()), abs=1e-3)
        values = [t.value for t in page.keys.tokens.high]
        assert values == sorted(values, reverse=True) and values[0] > page.keys.tokens.low[0].value


def test_value_side_is_the_direct_path(model: HookedRecurrent, planted: WriteTopKSAE, data: AtomPagesData) -> None:
    page = data[0]
    w = normalize(planted.w[0, 0].double(), dim=-1)
    path = w @ model.layer_W_O(LAYER)[HEAD] @ model.W_U
    path = path - path.mean()
    best = int(path.argmax())
    assert page.values.tokens.high[0].token == best
    assert page.values.tokens.high[0].value == pytest.approx(float(path.detach().max()), rel=1e-3)
    assert page.values.tokens.low[0].token == int(path.argmin())


def one_firing(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, pages: AtomPages) -> tuple[int, int]:
    """Sequence and position at which the effect of atom 0 is measured."""
    row = Facts(pages, model, planted, tokens, progress=False).drawn().iloc[0]
    return int(row["sequence"]), int(row["position"])


def test_effect_is_the_derivative_that_autograd_finds(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    """One firing, all first-order paths, at every listed token."""
    pages = replace(SMALL, atoms=(0,), effect_firings=1, effect_step=1e-3)
    data = pages.collect(model, planted, tokens, progress=False)
    s, t = one_firing(model, planted, tokens, pages)
    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    atom = matrix(planted, 0)

    def add(write: Tensor, hook: object) -> Tensor:
        changed = write.clone()
        changed[0, t] = write[0, t] + amount * write[0, t].detach().norm() * atom / atom.norm()
        return changed

    logits = model.run_with_hooks(tokens[s : s + 1], fwd_hooks=[(HOOK.replace("_vec", ""), add)])
    mean = logits[0, t : t + pages.effect_horizon + 1].mean(0)
    mean = mean - mean.mean()
    effect = data[0].effect
    assert effect is not None and effect.n == 1 and effect.size > 0
    for listed in effect.tokens.high[:3] + effect.tokens.low[:3]:
        (slope,) = torch.autograd.grad(mean[listed.token], amount, retain_graph=True)
        assert listed.value == pytest.approx(float(slope), rel=2e-3)


def test_half_life_is_that_of_the_atoms_own_key_side(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    """Against the step-by-step definition, on one atom whose firings are all followed."""
    pages = replace(SMALL, half_life_firings=1000)
    page = pages.collect(model, planted, tokens, progress=False)[2]
    recurrence = model.recurrence(tokens, LAYER)
    assert recurrence.log_decay is not None and recurrence.a is not None and recurrence.b is not None
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = (planted.encode(cache[HOOK].float())[..., 2] > 0)[:, :-1].nonzero().tolist()
        lives = []
        for s, t in active:
            p, size, step = planted.v[2, 0].double(), float(planted.v[2, 0].norm()), 0
            for step in range(1, min(pages.half_life_limit, T - 1 - t) + 1):
                one = [x[s, t + step, HEAD] for x in (recurrence.log_decay, recurrence.a, recurrence.b)]
                p = one[0].exp() * p + one[1] * (one[2] @ p)
                if p.norm() < size / 2:
                    break
            lives.append((step, bool(p.norm() >= size / 2)))
    assert page.memory == memory(lives) and page.memory.n == len(active) > 1


def test_a_timeline_is_what_the_head_reads_of_the_atom(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData
) -> None:
    """Against the response of the recurrence to a write of the atom alone."""
    active = {(p.atom, c.sequence, c.position): c.activation for p in data.atoms for b in p.bands for c in b.contexts}
    recurrence = model.recurrence(tokens, LAYER).select(heads=slice(HEAD, HEAD + 1))
    total = recurrence.outputs()[:, :, 0].norm(dim=-1)
    for page in data.atoms[:3]:
        assert page.timelines is not None
        for shown in page.timelines.firings:
            k, u = torch.zeros_like(recurrence.k), torch.zeros_like(recurrence.u)
            k[shown.sequence, shown.position] = (
                active[page.atom, shown.sequence, shown.position] * planted.v[page.atom].double()
            )
            u[shown.sequence, shown.position] = planted.w[page.atom].double()
            read = recurrence.with_write(k, u).outputs()[shown.sequence, :, 0].norm(dim=-1) / total[shown.sequence]
            here = slice(shown.position, shown.position + len(shown.reads))
            np.testing.assert_allclose(shown.reads, read[here].detach(), rtol=2e-3, atol=1e-9)
            assert shown.tokens == [model.to_string(int(i)) for i in tokens[shown.sequence, here]]
    assert data.atoms[0].timelines is not None
    assert data.atoms[0].timelines.lags.edges[:3] == [0, 1, 2] and max(data.atoms[0].timelines.lags.values) > 0


def test_an_atom_is_shown_as_a_matrix_among_its_neighbours(
    model: HookedRecurrent, planted: WriteTopKSAE, data: AtomPagesData
) -> None:
    flat = torch.stack([normalize(matrix(planted, page.atom).flatten(), dim=0) for page in data.atoms])
    for page in data.atoms:
        (term,) = page.terms
        np.testing.assert_allclose(term.size * np.outer(term.key, term.value), matrix(planted, page.atom), atol=2e-4)
        with Image.open(io.BytesIO(base64.b64decode(heatmap(page.terms).split("base64,")[1].split('"')[0]))) as image:
            drawn = np.asarray(image.convert("RGBA"), float)
        assert drawn.shape[:2] == (len(term.key), len(term.value))
        signs = np.where(drawn[..., 2] > drawn[..., 0], 1, -1)  # blue or orange
        whole = matrix(planted, page.atom).numpy()
        np.testing.assert_allclose(signs * drawn[..., 3] / 255, whole / np.abs(whole).max(), atol=0.04)
        cosines = {int(other.atom): float(flat[page.atom] @ flat[other.atom]) for other in data.atoms if other != page}
        assert [near.atom for near in page.nearest] == sorted(cosines, key=lambda atom: -cosines[atom])
        assert [near.cosine for near in page.nearest] == pytest.approx(
            [cosines[n.atom] for n in page.nearest], abs=1e-3
        )
        assert all(near.n_firings == data[near.atom].n_firings for near in page.nearest)


def test_an_atom_without_factors_has_terms_and_neighbours(model: HookedRecurrent, tokens: Tensor) -> None:
    sae = empty_sae(model, decoder="flat")
    torch.nn.init.normal_(sae.W_dec)
    page = SMALL.collect(model, sae, tokens, progress=False).atoms[0]
    rows = normalize(sae.W_dec.detach(), dim=-1)
    cosines = rows @ rows[page.atom]
    assert page.nearest and [near.cosine for near in page.nearest] == pytest.approx(
        [float(cosines[near.atom]) for near in page.nearest], abs=1e-3
    )
    shares = [term.share for term in page.terms]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True) and sum(shares) < 1


def test_histograms_hold_every_firing_and_every_token_of_the_vocabulary(data: AtomPagesData) -> None:
    for page in data.atoms:
        for bars in (page.density, page.logits):
            assert sum(bars.values) == pytest.approx(1, abs=1e-3) and bars.edges == sorted(bars.edges)
        assert page.density.edges[0] == 0 and page.density.edges[-1] == pytest.approx(page.max_activation, rel=1e-3)
        assert page.effect is not None
        top, bottom = page.effect.tokens.high[0].value, page.effect.tokens.low[0].value
        assert [page.logits.edges[0], page.logits.edges[-1]] == pytest.approx([bottom, top], rel=1e-3)


def test_every_page_says_how_good_the_dictionary_is(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData, tmp_path: Path
) -> None:
    quality = dictionary_quality(model, planted, tokens)
    assert data.info["quality"] == json.loads(json.dumps(quality.to_dict()))
    files = write_atom_pages(data, tmp_path)
    for file in (files.index, files.pages[0]):
        source = file.read_text()
        assert "explained variance" in source and quality.explained is not None and percent(quality.explained) in source


def test_memory_counts_writes_that_outlive_their_sequence() -> None:
    assert memory([(n, False) for n in (2, 4, 6)]).half_life == 4
    # Survival after 2: 3/4; the one that ended at 3 leaves the risk set; after 5: 3/8.
    curve = memory([(2, False), (3, True), (5, False), (9, True)])
    assert (curve.half_life, curve.ended, curve.n, curve.longest) == (5, 2, 4, 9)
    assert memory([(7, True)]).half_life is None and memory([]).n == 0


def test_higher_rank_shows_the_leading_term(model: HookedRecurrent, tokens: Tensor, tmp_path: Path) -> None:
    sae = empty_sae(model, rank=2)
    data = SMALL.collect(model, sae, tokens, progress=False)
    sigma = torch.linalg.svdvals(matrix(sae, data.atoms[0].atom))
    assert data.atoms[0].terms[0].share == pytest.approx(float(sigma[0] ** 2 / (sigma**2).sum()), rel=1e-4)
    assert "leading term" in render(data, data.atoms[0], tmp_path)


def test_pages_from_loaded_data_are_the_same(data: AtomPagesData, tmp_path: Path) -> None:
    files = write_atom_pages(data, tmp_path / "first")
    loaded = AtomPagesData.load(files.data)
    assert loaded == data and json.loads(files.data.read_text())["info"]["hook_name"] == HOOK
    again = write_atom_pages(loaded, tmp_path / "second")
    assert again.index.read_text() == files.index.read_text()
    assert [again.pages[a].read_text() for a in again.pages] == [p.read_text() for p in files.pages.values()]
    assert max(p.stat().st_size for p in files.pages.values()) < 100_000
    for file in (files.index, *files.pages.values()):
        links = re.findall(r'(?:src|href)="([^"]*)"', file.read_text())
        outside = [link for link in links if not link.startswith("data:image/png;base64,")]
        assert all((tmp_path / "first" / link).is_file() for link in outside) and "url(" not in file.read_text()


def test_tokens_are_escaped_and_visible(data: AtomPagesData, tmp_path: Path) -> None:
    evil = '<script>alert("&")</script>'
    first = Context(
        sequence=0, position=1, first=0, tokens=[evil, " a\n", "\u200b"], activations=[0.0, 1.0, 0.5], cosine=None
    )
    on = TokenValue(token=7, text=evil, value=1.0, n=3)
    page = data.atoms[0].model_copy(update={"top": [first], "fires_on": [on]})
    files = write_atom_pages(AtomPagesData(info=data.info, atoms=[page]), tmp_path)
    source, index = files.pages[page.atom].read_text(), files.index.read_text()
    assert evil not in source + index and source.count("<script") == 0 and index.count("<script") == 1
    assert all(html.escape("<script>alert(") in each for each in (source, index))
    assert "<i>·</i>a<i>↵</i></mark>" in source and "⟨U+200B⟩" in source
    assert visible(" a\tb\n") == "·a⇥b↵" and visible("") == "⟨empty⟩" and visible("é漢") == "é漢"


def _set(values: dict[str, object], path: str, value: object) -> None:
    """Put a value at a path such as "atoms.0.atom"."""
    *parents, last = path.split(".")
    at: object = values
    for name in parents:
        at = cast(list[object], at)[int(name)] if name.isdigit() else cast(dict[str, object], at)[name]
    cast(dict[str, object], at)[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("atoms.0.atom", "../../evil"),
        ("atoms.0.atom", -1),
        ("atoms.0.atom", 1),  # that of the next page
        ("atoms.0.sequel", 1),
        ("atoms.0.top.0.activations", [1.0]),
        ("atoms.0.top.0.first", 10**6),
        ("atoms.0.positions.values", [0.5]),
        ("atoms.0.rate", float("nan")),
        ("atoms.0.substitution.0.best_control", "unheard of"),
        ("info", {}),
        ("format", 1),
    ],
)
def test_a_file_that_does_not_fit_is_refused(data: AtomPagesData, tmp_path: Path, path: str, value: object) -> None:
    values = json.loads(data.model_dump_json())
    _set(values, path, value)
    file = tmp_path / "data.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        AtomPagesData.load(file)
    file.write_text(data.model_dump_json()[:-9])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        AtomPagesData.load(file)


def test_bytes_that_are_no_character_are_shown_as_bytes(model: HookedRecurrent) -> None:
    texts = TokenTexts(model)
    lost = [i for i in range(model.W_U.shape[1]) if "\ufffd" in model.to_string(i)]
    assert lost and all(re.fullmatch(r"⟨([0-9A-F]{2})+⟩", texts[i]) for i in lost)
    assert texts[model.to_single_token(" the")] == " the"


def test_substitution_and_readers_are_joined_by_atom(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, tested: Result, tmp_path: Path
) -> None:
    rows = [(0, 4, 1, "atom", 1.0), (0, 3, 0, "atom", 5.0), (0, 4, 1, "atom", 3.0), (0, 4, 1, "random", 0.5)]
    table = pd.DataFrame(rows, columns=["atom", "layer", "head", "condition", "change"]).assign(mixer="attention")
    read = Result(Readers(), {"hook_name": HOOK}, {"changes": table})
    data = SMALL.collect(model, planted, tokens, substitution=tested, readers=read, progress=False)
    wide = wide_firings(tested, choice="own")
    for page in data.atoms:
        own = wide[wide["written_atom"] == page.atom]
        assert page.substitution is not None and [s.scale for s in page.substitution] == ["matched"]
        for shown in page.substitution:
            kl = own[f"atom/{shown.scale}"]
            assert shown.n == len(own) > 0 and shown.win_rate == pytest.approx((kl < own["delete"]).mean())
            assert shown.median_kl == kl.median() and shown.best_control in (
                "random",
                "state",
                "pca",
            )  # never a reference
    readers = data[0].readers
    assert readers is not None and data[1].readers is None
    assert [(r.layer, r.head, r.change, r.typical) for r in readers.heads] == [(3, 0, 5.0, None), (4, 1, 2.0, 0.5)]
    assert "layer 3, attention head 0" in render(data, data[0], tmp_path)
    for wrong in (read, replace(tested, info={**tested.info, "hook_name": HOOK.replace("3", "0")})):
        with pytest.raises(ValueError, match="substitution"):
            SMALL.collect(model, planted, tokens, substitution=wrong, progress=False)


def test_atoms_are_drawn_from_those_that_were_tested(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, tested: Result
) -> None:
    firings = tested.tables["firings"]
    some = replace(tested, tables=tested.tables | {"firings": firings[firings["written_atom"].isin([1, 4])]})
    quick = replace(SMALL, effect_firings=0)
    data = quick.collect(model, planted, tokens, substitution=some, progress=False)
    assert [page.atom for page in data.atoms] == [1, 4] and all(page.substitution for page in data.atoms)
    nothing = replace(tested, tables={}, skipped="nothing to measure")
    bare = replace(quick, atoms=(2,), substitution_firings=0)
    assert bare.collect(model, planted, tokens, substitution=nothing, progress=False)[2].substitution is None


def test_bad_input_is_named(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, tmp_path: Path) -> None:
    for word, changes in {
        r"\[99\]": {"atoms": (0, 99)},
        "1000": {"min_firings": 1000},
        "T > 61": {"effect_horizon": 60},
    }.items():
        with pytest.raises(ValueError, match=word):
            replace(SMALL, **changes).collect(model, planted, tokens, progress=False)
    for name, value in {"top": 0, "atoms": (1, 1), "effect_step": 0.0, "n_atoms": -1}.items():
        with pytest.raises(ValueError, match=name):
            replace(SMALL, **{name: value})
    silent = empty_sae(model)
    silent.b_enc.data += 1  # everything fires, but nothing is written
    silent.v.data[:] = 0
    with pytest.raises(NothingToMeasureError):
        SMALL.collect(model, silent, tokens, progress=False)
    info = SMALL.collect(model, planted, tokens, progress=False).info
    with pytest.raises(ValueError, match="atoms"):
        write_atom_pages(AtomPagesData(info=info, atoms=[]), tmp_path / "none")


def test_the_command_writes_pages_from_folders(planted: WriteTopKSAE, tested: Result, tmp_path: Path) -> None:
    planted.save_model(str(tmp_path / "sae"))
    (tmp_path / "text.txt").write_text(embedded.text("test")[:3000])
    pages = replace(SMALL, n_atoms=2, effect_firings=0)
    show = Show(sae=tmp_path / "sae", text=tmp_path / "text.txt", context_size=48, out=tmp_path / "out")
    files = show.run(pages, progress=False)
    loaded = AtomPagesData.load(tmp_path / "out" / "data.json")
    assert files.index.is_file() and [page.atom for page in loaded.atoms] == list(files.pages) and len(files.pages) == 2
    folder = tested.save(tmp_path / "substitution")
    flags = ["--text", tmp_path / "text.txt", "--context-size", 48, "--n-atoms", 2, "--effect-firings", 0, "--out"]
    run_show([str(each) for each in (tmp_path, *flags, tmp_path / "joined")])  # finds both folders
    joined = AtomPagesData.load(tmp_path / "joined" / "data.json")
    assert all(page.substitution and len(page.substitution) == 1 for page in joined.atoms)
    with pytest.raises(ValueError, match="readers"):
        replace(show, readers=folder).run(pages, progress=False)
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin\.txt"):
        replace(show, text=tmp_path / "latin.txt").run(pages, progress=False)


def test_the_lead_says_what_the_numbers_say(data: AtomPagesData, tmp_path: Path) -> None:
    page = data.atoms[0]
    words = re.sub(r"\s+", " ", render(data, page, tmp_path))
    assert page.cosines is not None
    assert f"on “{visible(page.fires_on[0].text)}”" in words
    assert f"native write is {page.cosines.at_firings.median:.2f} (median)" in words
    assert f"half of its norm after {page.memory.half_life:g} token" in words
    bare = page.model_copy(update={"cosines": None})
    assert "native write is zero wherever" in render(AtomPagesData(info=data.info, atoms=[bare]), bare, tmp_path)


def test_direct_path_is_centred(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor) -> None:
    facts = Facts(SMALL, model, planted, tokens, progress=False)
    with torch.no_grad():
        assert np.abs(facts.direct.mean(1)).max() < 1e-5 and facts.direct.shape == (6, model.W_U.shape[1])


def test_readers_are_the_later_heads_whose_reads_change(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    """One firing, against reads of whole runs in which the write is changed by a hook."""
    pages = replace(SMALL, atoms=(0,), effect_firings=1, n_tokens=99)
    page = pages.collect(model, planted, tokens, progress=False)[0]
    s, t = one_firing(model, planted, tokens, pages)
    atom = matrix(planted, 0)
    names = [f"blocks.{layer}.mixer.hook_read" for layer in model.cfg.recurrent_layers if layer > LAYER]

    def reads(amount: float) -> dict[str, Tensor]:
        def add(write: Tensor, hook: object) -> Tensor:
            changed = write.clone()
            changed[0, t] += amount * write[0, t].norm() * atom / atom.norm()
            return changed

        with torch.no_grad(), model.hooks(fwd_hooks=[(HOOK.replace("_vec", ""), add)]):
            return dict(model.run_with_cache(tokens[s : s + 1], names_filter=names)[1].items())

    step, window = pages.effect_step, slice(t, t + pages.effect_horizon + 1)
    native, plus, minus = reads(0), reads(step), reads(-step)
    assert page.readers is not None and page.readers.heads[0].typical is None  # no other atom to compare with
    assert len(page.readers.heads) == sum(native[name].shape[2] for name in names)
    assert all(a.change >= b.change for a, b in itertools.pairwise(page.readers.heads))
    for reader in page.readers.heads:
        assert reader.mixer == "recurrence"  # the only attention of this model is in its first block
        own = [x[f"blocks.{reader.layer}.mixer.hook_read"][0, window, reader.head] for x in (plus, minus, native)]
        assert reader.change == pytest.approx(float((own[0] - own[1]).norm() / (2 * step) / own[2].norm()), rel=2e-3)


def test_a_small_substitution_test_is_run_where_none_is_given(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    """All firings of one atom, against whole runs in which a hook puts the atom, or nothing, in the write's place."""
    pages = replace(SMALL, atoms=(2,), substitution_firings=1000, effect_firings=0)
    page = pages.collect(model, planted, tokens, progress=False)[2]
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = planted.encode(cache[HOOK].float())[..., 2].double()  # [N,T]
    written, width = matrix(planted, 2), pages.effect_horizon + 1
    room = active.clone()
    room[:, 0] = room[:, T - width + 1 :] = 0

    def log_probs(s: int, t: int, write: Tensor | None) -> Tensor:
        def put(native: Tensor, hook: object) -> Tensor:
            changed = native.clone()
            changed[0, t] = native[0, t] if write is None else write
            return changed

        with torch.no_grad():
            logits = model.run_with_hooks(tokens[s : s + 1], fwd_hooks=[(HOOK.replace("_vec", ""), put)])
        return logits[0, t : t + width].log_softmax(-1)

    kl = []
    for s, t in room.nonzero().tolist():
        native = log_probs(s, t, None)
        rows = [log_probs(s, t, write) for write in (active[s, t] * written, torch.zeros_like(written))]
        kl.append([float((native.exp() * (native - row)).sum(-1).mean()) for row in rows])
    measured = np.array(kl)
    assert page.substitution is not None and len(page.substitution) == 1
    shown = page.substitution[0]
    assert shown.n == len(measured) > 3 and shown.scale == "coefficient"
    assert shown.win_rate == pytest.approx((measured[:, 0] < measured[:, 1]).mean())
    assert [shown.median_kl, shown.median_kl_delete] == pytest.approx(np.median(measured, axis=0).tolist(), rel=1e-3)
    none = replace(SMALL, atoms=(2,), substitution_firings=0, effect_firings=0)
    bare = none.collect(model, planted, tokens, progress=False)[2]
    assert bare.substitution is None and bare.readers is None and bare.effect is None


def test_a_head_that_nothing_follows_has_no_readers(model: HookedRecurrent, tokens: Tensor) -> None:
    sae, last = empty_sae(model), max(model.cfg.recurrent_layers)
    sae.cfg.metadata.hook_name = HOOK.replace(f"blocks.{LAYER}", f"blocks.{last}")
    data = replace(SMALL, substitution_firings=0).collect(model, sae, tokens, progress=False)
    assert all(page.readers is None for page in data.atoms) and any(page.effect for page in data.atoms)


def test_another_tokenizer_is_refused(model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor) -> None:
    foreign = tokens.clone()
    foreign[1, 3] = size = TokenTexts(model).size
    with pytest.raises(ValueError, match=str(size)):
        SMALL.collect(model, planted, foreign, progress=False)
    for tokenizer, word in ((range(10), "got 10"), (None, "got 0")):
        with pytest.raises(ValueError, match=word):
            TokenTexts(cast(HookedRecurrent, SimpleNamespace(tokenizer=tokenizer, W_U=torch.zeros(3, 5))))
