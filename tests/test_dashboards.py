"""Atom dashboards: exact on planted dictionaries, whole as JSON, and sound as pages."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_substitution import HOLDS, fake_result
from planted_atoms import HEAD, HOOK, LAYER, SMALL, T, empty_sae, float64_model, held_out, places, planted_sae
from torch import Tensor
from typer.testing import CliRunner

from hookpoints import embedded as embedded_model
from sae_lens_writesae.cli import app
from sae_lens_writesae.firings import HeadHook, collect_firings
from sae_lens_writesae.page.dashboards import AtomPage, Dashboard, DashboardConfig, atom_dashboards, write_dashboards
from sae_lens_writesae.page.dashboards.collect import _atoms, _table
from sae_lens_writesae.page.dashboards.data import TokenValue
from sae_lens_writesae.page.dashboards.effects import direct_path, effect_firings
from sae_lens_writesae.page.dashboards.memory import Lifetime, memory
from sae_lens_writesae.page.dashboards.pages import chip, lead, token
from sae_lens_writesae.page.dashboards.token_text import TokenTexts, visible
from sae_lens_writesae.reproduce import ReproduceConfig
from sae_lens_writesae.reproduce.tasks import Dictionary
from sae_lens_writesae.reproduce.workspace import Workspace
from sae_lens_writesae.show_cli import show_atoms
from sae_lens_writesae.substitution_evaluation import Substitution


@pytest.fixture(scope="module")
def model() -> Any:
    return float64_model()


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    return held_out(model)


@pytest.fixture(scope="module")
def planted(model: Any, tokens: Tensor) -> Any:
    return planted_sae(model, tokens)


@pytest.fixture(scope="module")
def data(model: Any, planted: Any, tokens: Tensor) -> Dashboard:
    return atom_dashboards(model, planted, tokens, SMALL, progress=False)


def test_a_planted_write_is_found_where_it_was_taken(model: Any, tokens: Tensor, data: Dashboard) -> None:
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


def test_counts_are_those_of_the_encoder(planted: Any, model: Any, tokens: Tensor, data: Dashboard) -> None:
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


def test_key_side_is_the_mean_cosine_by_token(model: Any, planted: Any, tokens: Tensor, data: Dashboard) -> None:
    keys = torch.nn.functional.normalize(model.recurrence(tokens, LAYER).k[:, :, HEAD], dim=-1)
    for page in data.atoms[:2]:
        v = torch.nn.functional.normalize(planted.v[page.atom, 0].double(), dim=-1) * (-1 if page.atom == 1 else 1)
        for listed in page.keys.tokens.high[:3] + page.keys.tokens.low[:3]:
            here = tokens == listed.token
            assert listed.n == here.sum() >= SMALL.min_token_count
            assert listed.value == pytest.approx(float((keys[here] @ v).mean().detach()), abs=1e-3)
        values = [t.value for t in page.keys.tokens.high]
        assert values == sorted(values, reverse=True) and values[0] > page.keys.tokens.low[0].value


def test_value_side_is_the_direct_path(model: Any, planted: Any, data: Dashboard) -> None:
    page = data[0]
    w = torch.nn.functional.normalize(planted.w[0, 0].double(), dim=-1)
    path = w @ model.W_O(LAYER, HEAD) @ model.W_U
    path = path - path.mean()
    best = int(path.argmax())
    assert page.values.tokens.high[0].token == best
    assert page.values.tokens.high[0].value == pytest.approx(float(path.detach().max()), rel=1e-3)
    assert page.values.tokens.low[0].token == int(path.argmin())


def one_firing(model: Any, planted: Any, tokens: Tensor, config: DashboardConfig) -> tuple[int, int]:
    """Sequence and position at which the effect of atom 0 is measured."""
    chosen = _atoms(model, planted, HeadHook.parse(HOOK), np.array([0]))[0]
    row: Any = effect_firings(_table(collect_firings(model, planted, tokens), chosen), T, config).iloc[0]
    return int(row["sequence"]), int(row["position"])


def test_effect_is_the_derivative_that_autograd_finds(model: Any, planted: Any, tokens: Tensor) -> None:
    """One firing, all first-order paths, at every listed token."""
    config = DashboardConfig(**SMALL.to_dict() | {"atoms": (0,), "effect_firings": 1, "effect_step": 1e-3})
    data = atom_dashboards(model, planted, tokens, config, progress=False)
    s, t = one_firing(model, planted, tokens, config)
    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    atom = planted.atoms([0]).dense()[0].double()

    def add(write: Tensor, hook: Any) -> Tensor:
        changed = write.clone()
        changed[0, t] = write[0, t] + amount * write[0, t].detach().norm() * atom / atom.norm()
        return changed

    logits = model.run_with_hooks(tokens[s : s + 1], fwd_hooks=[(HOOK.replace("_vec", ""), add)])
    mean = logits[0, t : t + config.effect_horizon + 1].mean(0)
    mean = mean - mean.mean()
    effect = data[0].effect
    assert effect is not None and effect.n == 1 and effect.size > 0
    for listed in effect.tokens.high[:3] + effect.tokens.low[:3]:
        (slope,) = torch.autograd.grad(mean[listed.token], amount, retain_graph=True)
        assert listed.value == pytest.approx(float(slope), rel=2e-3)


def test_half_life_is_that_of_the_atoms_own_key_side(model: Any, planted: Any, tokens: Tensor) -> None:
    """Against the step-by-step definition, on one atom whose firings are all followed."""
    config = DashboardConfig(**SMALL.to_dict() | {"half_life_firings": 1000})
    page = atom_dashboards(model, planted, tokens, config, progress=False)[2]
    recurrence = model.recurrence(tokens, LAYER)
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = (planted.encode(cache[HOOK].float())[..., 2] > 0)[:, :-1].nonzero().tolist()
        lives = []
        for s, t in active:
            p, size = planted.v[2, 0].double(), float(planted.v[2, 0].norm())
            for step in range(1, min(config.half_life_limit, T - 1 - t) + 1):
                one = [x[s, t + step, HEAD] for x in (recurrence.log_decay, recurrence.a, recurrence.b)]
                p = one[0].exp() * p + one[1] * (one[2] @ p)
                if p.norm() < size / 2:
                    break
            lives.append(Lifetime(0, step, bool(p.norm() >= size / 2)))
    assert page.memory == memory(lives) and page.memory.n == len(active) > 1


def test_memory_counts_writes_that_outlive_their_sequence() -> None:
    assert memory([Lifetime(0, n, False) for n in (2, 4, 6)]).half_life == 4
    # Survival after 2: 3/4; the one that ended at 3 leaves the risk set; after 5: 3/8.
    found = memory([Lifetime(0, 2, False), Lifetime(0, 3, True), Lifetime(0, 5, False), Lifetime(0, 9, True)])
    assert (found.half_life, found.ended, found.n, found.longest) == (5, 2, 4, 9)
    assert memory([Lifetime(0, 7, True)]).half_life is None and memory([]).n == 0


def test_higher_rank_shows_the_leading_term(model: Any, tokens: Tensor) -> None:
    sae = empty_sae(model, rank=2)
    data = atom_dashboards(model, sae, tokens, SMALL, progress=False)
    matrix = sae.atoms([data.atoms[0].atom]).dense()[0]
    sigma = torch.linalg.svdvals(matrix.detach())
    assert data.atoms[0].rank_share == pytest.approx(float(sigma[0] ** 2 / (sigma**2).sum()), rel=1e-4)
    assert "leading term" in render(data, data.atoms[0])


def render(data: Dashboard, page: AtomPage, folder: Path | None = None) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        return write_dashboards(data, folder or made).pages[page.atom].read_text()


def test_roundtrip_and_pages_from_loaded_data(data: Dashboard, tmp_path: Path) -> None:
    files = write_dashboards(data, tmp_path / "first")
    loaded = Dashboard.load(files.data)
    assert loaded == data and json.loads(files.data.read_text())["info"]["hook_name"] == HOOK
    again = write_dashboards(loaded, tmp_path / "second")
    assert again.index.read_text() == files.index.read_text()
    assert [again.pages[a].read_text() for a in again.pages] == [p.read_text() for p in files.pages.values()]
    assert max(p.stat().st_size for p in files.pages.values()) < 100_000
    for file in (files.index, *files.pages.values()):
        links = re.findall(r'(?:src|href)="([^"]*)"', file.read_text())
        assert all((tmp_path / "first" / link).is_file() for link in links) and "url(" not in file.read_text()


def test_tokens_are_escaped_and_visible(data: Dashboard) -> None:
    evil = '<script>alert("&")</script>'
    context = data.atoms[0].top[0]
    first = context.__class__(0, 1, 0, [evil, " a\n", "\u200b"], [0.0, 1.0, 0.5], None)
    page = AtomPage(**{**vars(data.atoms[0]), "top": [first], "fires_on": [TokenValue(7, evil, 1.0, 3)]})
    source = render(Dashboard(data.info, [page]), page)
    assert evil not in source and source.count("<script") == 0
    assert html.escape("<script>alert(").replace("&quot;", '"') in source
    assert "<i>·</i>a<i>↵</i></mark>" in source and "⟨U+200B⟩" in source
    assert evil not in token(page.fires_on[0]) + chip(page.fires_on[0]) and "&lt;script&gt;" in chip(page.fires_on[0])
    assert visible(" a\tb\n") == "·a⇥b↵" and visible("") == "⟨empty⟩" and visible("é漢") == "é漢"


def test_bytes_that_are_no_character_are_shown_as_bytes(model: Any) -> None:
    texts = TokenTexts(model)
    lost = [i for i in range(model.W_U.shape[1]) if "\ufffd" in model.to_string(i)]
    assert lost and all(re.fullmatch(r"⟨([0-9A-F]{2})+⟩", texts(i)) for i in lost)
    assert texts(model.to_single_token(" the")) == " the"


def test_substitution_and_readers_are_joined_by_atom(model: Any, planted: Any, tokens: Tensor) -> None:
    result = fake_result(HOLDS, head=HEAD, n_sequences=10)
    object.__setattr__(result.info, "hook_name", HOOK)
    table = pd.DataFrame({"atom": [0, 0, 0], "layer": [4, 3, 4], "head": [1, 0, 1], "change": [1.0, 5.0, 3.0]})
    data = atom_dashboards(model, planted, tokens, SMALL, substitution=result, readers=table, progress=False)
    wide: Any = result.wide()
    own = wide[wide["written_atom"] == 0]
    shown = data[0].substitution
    assert shown is not None and [s.scale for s in shown] == list(result.info.config.scales)
    assert shown[0].win_rate == pytest.approx((own["atom/coefficient"] < own["delete"]).mean()) and shown[0].n == len(
        own
    )
    readers = data[0].readers
    assert readers is not None and [(r.layer, r.head, r.change) for r in readers.heads] == [(3, 0, 5.0), (4, 1, 2.0)]
    assert data[1].readers is None and "layer 3, head 0" in render(data, data[0])
    with pytest.raises(ValueError, match="columns atom, layer, head, change; change missing"):
        atom_dashboards(model, planted, tokens, SMALL, readers=table.drop(columns="change"), progress=False)
    with pytest.raises(ValueError, match=r"test is about blocks\.1"):
        atom_dashboards(model, planted, tokens, SMALL, substitution=fake_result(HOLDS), progress=False)


def test_bad_input_is_named(model: Any, planted: Any, tokens: Tensor, tmp_path: Path) -> None:
    def run(sae: Any = planted, at: Tensor = tokens, **fields: Any) -> Dashboard:
        return atom_dashboards(model, sae, at, DashboardConfig(**SMALL.to_dict() | fields), progress=False)

    with pytest.raises(ValueError, match=r"atoms \[99\] have fewer than 1 firings on 4 sequences of 48"):
        run(atoms=(0, 99))
    with pytest.raises(ValueError, match="no atom fires 1000 times"):
        run(min_firings=1000)
    with pytest.raises(ValueError, match="T > 61"):
        run(effect_horizon=60)
    with pytest.raises(ValueError, match="top must be at least 1, found 0"):
        DashboardConfig(top=0)
    with pytest.raises(ValueError, match="named once each"):
        DashboardConfig(atoms=(1, 1))
    silent = empty_sae(model)
    silent.b_enc.data += 1  # everything fires, but nothing is written
    silent.v.data[:] = 0
    with pytest.raises(ValueError, match="zero matrices"):
        run(sae=silent)
    with pytest.raises(ValueError, match="empty"):
        write_dashboards(Dashboard({}, []), tmp_path / "none")
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(ValueError, match="cut short"):
        Dashboard.load(tmp_path / "data.json")
    (tmp_path / "data.json").write_text('{"format": 1, "info": {}, "atoms": [{}]}')
    with pytest.raises(ValueError, match="no dashboard"):
        Dashboard.load(tmp_path / "data.json")


def test_command_line(planted: Any, tmp_path: Path) -> None:
    planted.save_model(str(tmp_path / "sae"))
    text = tmp_path / "text.txt"
    text.write_text(embedded_model.text("test")[:3000])
    command = [
        "show",
        str(tmp_path / "sae"),
        "--text",
        str(text),
        "--context-size",
        "48",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*command, "--n", "2"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "index.html").is_file() and len(
        Dashboard.load(tmp_path / "out" / "data.json").atoms
    ) == 2
    wrong = CliRunner().invoke(app, [*command, "--atoms", "1;2"])
    assert wrong.exit_code == 2 and "as 3,17,42; found '1;2'" in wrong.output.replace("\n", " ")


def test_the_lead_says_what_the_numbers_say(data: Dashboard) -> None:
    page = data.atoms[0]
    words = lead(page)
    assert visible(page.fires_on[0].text) in words and f"{page.cosines.at_firings.median:.2f}" in words  # type: ignore[union-attr]
    assert "native write is zero" in lead(AtomPage(**{**vars(page), "cosines": None}))


def test_direct_path_is_centred(model: Any, planted: Any) -> None:
    hook = HeadHook.parse(HOOK)
    path = direct_path(model, hook, _atoms(model, planted, hook, np.arange(6))[0])
    assert np.abs(path.mean(1)).max() < 1e-5 and path.shape == (6, model.W_U.shape[1])


def test_readers_are_the_later_heads_whose_reads_change(model: Any, planted: Any, tokens: Tensor) -> None:
    """One firing, against reads of whole runs in which the write is changed by a hook."""
    config = DashboardConfig(**SMALL.to_dict() | {"atoms": (0,), "effect_firings": 1, "n_tokens": 99})
    page = atom_dashboards(model, planted, tokens, config, progress=False)[0]
    s, t = one_firing(model, planted, tokens, config)
    atom = planted.atoms([0]).dense()[0].double()
    names = [f"blocks.{layer}.mixer.hook_read" for layer in model.cfg.recurrent_layers if layer > LAYER]

    def reads(amount: float) -> dict[str, Tensor]:
        def add(write: Tensor, hook: Any) -> Tensor:
            changed = write.clone()
            changed[0, t] += amount * write[0, t].norm() * atom / atom.norm()
            return changed

        with torch.no_grad(), model.hooks(fwd_hooks=[(HOOK.replace("_vec", ""), add)]):
            return model.run_with_cache(tokens[s : s + 1], names_filter=names)[1]

    step, window = config.effect_step, slice(t, t + config.effect_horizon + 1)
    native, plus, minus = reads(0), reads(step), reads(-step)
    assert page.readers is not None and page.readers.heads[0].typical is None  # no other atom to compare with
    assert len(page.readers.heads) == sum(native[name].shape[2] for name in names)
    assert all(a.change >= b.change for a, b in itertools.pairwise(page.readers.heads))
    for reader in page.readers.heads:
        assert reader.mixer == "recurrence"  # the only attention of this model is in its first block
        own = [x[f"blocks.{reader.layer}.mixer.hook_read"][0, window, reader.head] for x in (plus, minus, native)]
        assert reader.change == pytest.approx(float((own[0] - own[1]).norm() / (2 * step) / own[2].norm()), rel=2e-3)


def test_a_small_substitution_test_is_run_where_none_is_given(model: Any, planted: Any, tokens: Tensor) -> None:
    """All firings of one atom, against whole runs in which a hook puts the atom, or nothing, in the write's place."""
    config = DashboardConfig(**SMALL.to_dict() | {"atoms": (2,), "substitution_firings": 1000, "effect_firings": 0})
    page = atom_dashboards(model, planted, tokens, config, progress=False)[2]
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    with torch.no_grad():
        active = planted.encode(cache[HOOK].float())[..., 2].double()  # [N,T]
    matrix, width = planted.atoms([2]).dense()[0].double(), config.effect_horizon + 1
    room = active.clone()
    room[:, 0] = room[:, T - width + 1 :] = 0

    def log_probs(s: int, t: int, write: Tensor | None) -> Tensor:
        def put(native: Tensor, hook: Any) -> Tensor:
            changed = native.clone()
            changed[0, t] = native[0, t] if write is None else write
            return changed

        with torch.no_grad():
            logits = model.run_with_hooks(tokens[s : s + 1], fwd_hooks=[(HOOK.replace("_vec", ""), put)])
        return logits[0, t : t + width].log_softmax(-1)

    kl = []
    for s, t in room.nonzero().tolist():
        native = log_probs(s, t, None)
        rows = [log_probs(s, t, write) for write in (active[s, t] * matrix, torch.zeros_like(matrix))]
        kl.append([float((native.exp() * (native - row)).sum(-1).mean()) for row in rows])
    found = np.array(kl)
    assert page.substitution is not None and len(page.substitution) == 1
    shown = page.substitution[0]
    assert shown.n == len(found) > 3 and shown.scale == "coefficient"
    assert shown.win_rate == pytest.approx((found[:, 0] < found[:, 1]).mean())
    assert [shown.median_kl, shown.median_kl_delete] == pytest.approx(np.median(found, axis=0).tolist(), rel=1e-3)
    none = DashboardConfig(**SMALL.to_dict() | {"atoms": (2,), "substitution_firings": 0, "effect_firings": 0})
    bare = atom_dashboards(model, planted, tokens, none, progress=False)[2]
    assert bare.substitution is None and bare.readers is None and bare.effect is None


def test_another_tokenizer_is_refused(model: Any, planted: Any, tokens: Tensor) -> None:
    foreign = tokens.clone()
    foreign[1, 3] = len(model.tokenizer)
    with pytest.raises(ValueError, match=rf"has token {len(model.tokenizer)}, and the tokenizer knows 0 to"):
        atom_dashboards(model, planted, foreign, SMALL, progress=False)
    with pytest.raises(ValueError, match="tokenizer has 10 tokens and the model's vocabulary 5"):
        TokenTexts(SimpleNamespace(tokenizer=range(10), W_U=torch.zeros(3, 5)))
    with pytest.raises(ValueError, match="no tokenizer"):
        TokenTexts(SimpleNamespace(tokenizer=None))


def test_saved_results_are_joined_by_the_command_line(planted: Any, tmp_path: Path) -> None:
    planted.save_model(str(tmp_path / "sae"))
    result = fake_result(HOLDS, head=HEAD, n_sequences=10)
    object.__setattr__(result.info, "hook_name", HOOK)
    tested = Substitution.of(result).save(tmp_path / "substitution")
    small = DashboardConfig(**SMALL.to_dict() | {"effect_firings": 0})
    at = {"sequences": 4, "context_size": 48, "progress": False}
    files = show_atoms(tmp_path / "sae", tmp_path / "out", small, substitution=tested, **at)
    pages = Dashboard.load(files.data).atoms
    assert {p.atom for p in pages} <= set(result.frame["written_atom"])
    assert all(p.substitution and [s.scale for s in p.substitution] == list(result.info.config.scales) for p in pages)
    with pytest.raises(ValueError, match="holds substitution, which has no table 'changes'"):
        show_atoms(tmp_path / "sae", tmp_path / "out", small, readers=tested, **at)


def test_a_reproduction_shows_the_atoms_that_it_tested(planted: Any, tmp_path: Path) -> None:
    config = ReproduceConfig(
        "embedded", layers=(LAYER,), heads=(HEAD,), eval_sequences=4, context_size=64, dashboards=3
    )
    dictionary = Dictionary(LAYER, HEAD, "write", "", 0)
    planted.save_model(str(tmp_path / dictionary.key / "sae"))
    result = fake_result(HOLDS, head=HEAD, n_sequences=10)
    object.__setattr__(result.info, "hook_name", HOOK)
    Substitution.of(result).save(tmp_path / dictionary.key / "substitution")
    Workspace(config, tmp_path, "cpu").show(dictionary)
    shown = Dashboard.load(tmp_path / dictionary.key / "atoms" / "data.json")
    assert 0 < len(shown.atoms) <= 3 and all(page.substitution for page in shown.atoms)
    assert shown.info["label"] == f"L{LAYER}H{HEAD} write-trained"
    assert not (tmp_path / dictionary.key / ".atoms").exists()
