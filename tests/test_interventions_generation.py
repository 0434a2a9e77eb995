"""Sign test, installed tokens and scaled atoms: against passes by hand, and nothing changed where nothing is done."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import HEAD, LAYER, logits_with_write, native_writes, random_sae
from torch import Tensor

from hookpoints import EditError, WriteEdit
from sae_lens_writesae import scale_atoms
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.firings import Firings, HeadHook
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.interventions import amplify
from sae_lens_writesae.interventions.amplify import AmplifyConfig, run_amplify
from sae_lens_writesae.interventions.draw import halves
from sae_lens_writesae.interventions.generation import greedy_rows, sampled
from sae_lens_writesae.interventions.install import Install, InstallConfig, install_edits, run_install
from sae_lens_writesae.interventions.sign import Sign, SignConfig, run_sign
from sae_lens_writesae.steering import value_direction

HOOK = HeadHook("", LAYER, HEAD, "write")
INSTALL = {"pairs": 3, "prompt_tokens": 7, "sizes": (3.0,), "new_tokens": 3}
AMPLIFY = {"n_tokens": 2, "min_count": 2, "min_firings": 1, "prompts": 3, "prompt_tokens": 5, "new_tokens": 6}


@pytest.fixture
def model(model64: Any) -> Any:
    return model64


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (6, 21), generator=torch.Generator().manual_seed(8))


def signs(model: Any, tokens: Tensor, **changes: Any) -> Sign:
    small: dict[str, Any] = {"n_positions": 6, "ranks": ((1, 10), (11, 60)), "sizes": (1e-4,), "first_position": 3}
    return run_sign(model, random_sae(model), tokens, SignConfig(**small | changes), progress=False)


def test_the_logit_of_a_small_write_turns_with_its_sign_and_is_predicted(model: Any, tokens: Tensor) -> None:
    """At small m the readout is linear: F2 is right in sign and size, and the two signs of m are opposite."""
    found = signs(model, tokens)
    table = found.tables["writes"]
    assert len(table) == 6 * 2 * 4 * 2  # positions, ranks, directions, signs
    up, down = (table[table["m"] * sign > 0]["measured"].to_numpy() for sign in (1, -1))
    np.testing.assert_allclose(up, -down, rtol=0.02, atol=1e-9)
    for direction in ("direct", "gradient", "random", "wrong"):
        assert found.rate(direction, "f2").rate == 1.0
    assert (found.sizes()["f2_r2"] > 0.9999).all()


def test_predictions_of_the_paper_are_the_formula(model: Any, tokens: Tensor) -> None:
    table = signs(model, tokens).tables["writes"]
    for row in table[table["direction"] == "direct"].iloc[::5].itertuples():
        with torch.no_grad():
            r = model.recurrence(tokens[[row.sequence]], LAYER)
            k, u, q = (part[0, row.position, HEAD] for part in (r.k, r.u, r.q))
            naive = model.W_O(LAYER, HEAD) @ model.W_U[:, row.token]
            reach = torch.nn.functional.normalize(k, dim=0) @ (r.scale * q)
            expected = row.m * k.norm() * u.norm() * reach * naive.norm()
        assert row.f0 == pytest.approx(float(expected), rel=1e-5) and row.aimed == np.sign(row.f0)


def test_signs_are_measured_as_in_a_full_pass(model: Any, tokens: Tensor) -> None:
    table = signs(model, tokens, sizes=(2.0,)).tables["writes"]
    row = table[(table["direction"] == "direct") & (table["m"] < 0)].iloc[0]
    t, sequence = int(row["position"]), tokens[[int(row["sequence"])]]
    keys, values = native_writes(model, sequence)
    w = value_direction(model, LAYER, HEAD, int(row["token"]))

    def change(writes: Tensor) -> Tensor:
        writes[t] += -2 * values[t].norm() * torch.outer(keys[t], w)
        return writes

    logits = [logits_with_write(model, sequence, how)[t, row["token"]] for how in (lambda x: x, change)]
    assert row["measured"] == pytest.approx(float(logits[1] - logits[0]), rel=1e-5)
    native = logits_with_write(model, sequence, lambda x: x)[t]
    assert row["rank"] == 1 + int((native > native[row["token"]]).sum())


def test_targets_of_the_sign_test_may_be_named(model: Any, tokens: Tensor) -> None:
    found = signs(model, tokens, targets=(5, 9, 30))
    assert set(found.tables["writes"]["token"]) <= {5, 9, 30}
    with pytest.raises(ValueError, match="at least two tokens"):
        SignConfig(targets=(5,))


def test_positions_without_a_write_are_left_out_and_counted(model: Any, tokens: Tensor) -> None:
    def mute(value: Tensor, hook: Any, positions: slice = slice(None)) -> Tensor:
        value = value.clone()
        value[:, positions] = 0
        return value

    name = f"blocks.{LAYER}.mixer.hook_v"
    with model.hooks(fwd_hooks=[(name, mute)]), pytest.raises(ValueError, match="no position could be written at"):
        signs(model, tokens)
    with model.hooks(fwd_hooks=[(name, lambda value, hook: mute(value, hook, slice(0, 10)))]):
        found = signs(model, tokens, n_positions=12)
    assert found.tables["writes"]["position"].min() >= 10
    assert found.info["omitted"]["positions with a zero write"] > 0


def test_an_install_of_no_strength_changes_no_bit(model: Any, tokens: Tensor) -> None:
    prompt = tokens[:1, :9]
    writes = head_writes(model.recurrence(prompt, LAYER), HEAD, "additive")
    edits = install_edits(HOOK, writes, value_direction(model, LAYER, HEAD, 5), 0.0, 3)
    assert [edit.position for edit in edits] == [6, 7, 8]
    with torch.no_grad():
        native = model(prompt)
        with model.edits(edits):
            assert torch.equal(model(prompt), native)
    rows = greedy_rows(model, prompt.expand(2, -1), [edits, []], 5)
    assert rows[0] == rows[1]


def _zero(model: Any) -> tuple[Tensor, Tensor]:
    shape = model.cfg.layer(LAYER)
    return torch.zeros(shape.K).double(), torch.zeros(shape.V).double()


def test_greedy_rows_are_the_argmax_of_full_passes_with_their_own_edits(model: Any, tokens: Tensor) -> None:
    prompts = tokens[:3, :9]
    rows: list[list[WriteEdit]] = [[]]
    for n in (1, 2):
        writes = head_writes(model.recurrence(prompts[[n]], LAYER), HEAD, "additive")
        rows.append(install_edits(HOOK, writes, value_direction(model, LAYER, HEAD, 5), 6.0, 3))
    found = greedy_rows(model, prompts, rows, 4, batch_size=2)
    for prompt, row, continuation in zip(prompts, rows, found):
        ids = prompt[None]
        for token in continuation:
            last = model.run_with_edits(ids, [row]).logits[0, -1] if row else model(ids).detach()[0, -1]
            assert token == int(last.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    with pytest.raises(ValueError, match="each prompt needs its row"):
        greedy_rows(model, prompts, rows[:2], 2)
    with pytest.raises(EditError, match="position 40 never acted"):
        greedy_rows(model, prompts[:1], [[WriteEdit(LAYER, HEAD, 40, *_zero(model))]], 2)


def test_installed_writes_are_those_of_the_definition(model: Any, tokens: Tensor) -> None:
    found = run_install(model, random_sae(model), tokens, InstallConfig(**INSTALL, n_positions=2), progress=False)
    table = found.tables["continuations"]
    assert found.strata == ["frequent"] and found.info["omitted"]["pairs whose stratum is not in the vocabulary"] == 6
    assert len(table) == 3 * 3 and table.groupby("pair")["sequence"].nunique().eq(1).all()  # nothing, target, random
    assert (table["hit"] == (table["first"] >= 0)).all() and table["rank"].between(2, 10).all()
    row = table[table["condition"] == "target"].iloc[0]
    rng = np.random.default_rng([0, 2])
    starts = rng.permutation(tokens.shape[1] // 7) * 7
    assert int(row["sequence"]) == rng.permutation(len(tokens))[0]
    prompt = tokens[[row["sequence"]], starts[0] : starts[0] + 7]
    keys, values = native_writes(model, prompt)
    w = value_direction(model, LAYER, HEAD, int(row["token"]))

    def change(writes: Tensor) -> Tensor:
        for t in (5, 6):
            writes[t] += 3 * values[t].norm() * torch.outer(keys[t], w)
        return writes

    logits = [logits_with_write(model, prompt, how)[-1].log_softmax(-1)[row["token"]] for how in (lambda x: x, change)]
    assert row["log_prob_change"] == pytest.approx(float(logits[1] - logits[0]), rel=1e-5)


def test_targets_of_an_install_may_be_strings(embedded: Any) -> None:
    ids = embedded.to_tokens("The people of the city were told that the war would be over soon, and so it was.")[0]
    ids = ids[:16].repeat(4, 1)
    config = InstallConfig(**INSTALL | {"pairs": 2, "prompt_tokens": 5, "new_tokens": 2}, semantic=(" the", " of"))
    found = run_install(embedded, random_sae(embedded), ids, config, progress=False)
    own = found.tables["continuations"].query("stratum == 'semantic'")
    assert set(own["text"]) <= {" the", " of"} and (own["token"] != own["wrong"]).all()
    assert not any("semantic" in note for note in found.notes())
    with pytest.raises(ValueError, match="tokens, not one"):
        run_install(embedded, random_sae(embedded), ids, InstallConfig(**INSTALL, semantic=(" the people", " of")))


def test_samples_are_the_same_for_one_seed_and_leave_the_generator_alone(model: Any, tokens: Tensor) -> None:
    before = torch.random.get_rng_state()
    one = sampled(model, tokens[:3, :5], 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and one.tokens.shape == (3, 6) and one.finite.all()
    assert torch.equal(one.tokens, sampled(model, tokens[:3, :5], 6, seed=3).tokens)
    assert not torch.equal(one.tokens, sampled(model, tokens[:3, :5], 6, seed=4).tokens)


def test_a_continuation_that_grows_past_the_dtype_is_marked_and_leaves_the_others_alone(
    model: Any, tokens: Tensor
) -> None:
    def broken(writes: Tensor, hook: Any) -> Tensor:
        return torch.where(torch.tensor([False, True, False])[:, None, None, None], torch.nan, writes)

    prompts = tokens[:3, :5]
    native = sampled(model, prompts, 6, seed=3)
    with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", broken)]):
        found = sampled(model, prompts, 6, seed=3)
    assert found.finite.tolist() == [True, False, True] and found.tokens.shape == (3, 6)
    assert torch.equal(found.tokens[::2], native.tokens[::2])


def test_alignment_is_the_correlation_of_firing_and_token() -> None:
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(0, 3, (4, 30)))
    fires = rng.random((4, 30, 2)) < 0.3
    fires[..., 1] = ids.numpy() == 2  # atom 1 fires at token 2 and nowhere else
    sequence, position, atom = fires.nonzero()
    firings = Firings(sequence, position, atom, np.ones(len(atom), np.float32), 4, 30, 3)  # atom 2 never fires
    for aligned in ("current", "next"):
        config = AmplifyConfig(**AMPLIFY, aligned=aligned)
        part = np.array([1, 3])
        places = amplify._labelled(firings, ids, part, config)
        labels, fired = (ids, fires) if aligned == "current" else (ids[:, 1:], fires[:, :-1])
        for token in range(3):
            found = amplify.alignment(places, token)
            for i in range(2):
                pair = fired[part][..., i].ravel(), (labels[part] == token).numpy().ravel()
                assert found.phi[i] == pytest.approx(np.corrcoef(*pair)[0, 1])
            assert found.phi[2] == 0 and found.present == int((labels[part] == token).sum())
        if aligned == "current":
            assert amplify.alignment(places, 2).phi[1] == pytest.approx(1)
            chosen = amplify.choose_atoms(_NoTokenizer, places, [2, 0], config)
            assert chosen == {2: 1, 0: 0}


class _NoTokenizer:
    tokenizer = None


def amplified(model: Any, ids: Tensor, sae: Any, **changes: Any) -> Any:
    return run_amplify(model, sae, ids, AmplifyConfig(**AMPLIFY | changes), progress=False)


@pytest.mark.parametrize("target", ["write", "state"])
def test_counts_are_those_of_text_sampled_under_scaled_atoms(model: Any, tokens: Tensor, target: str) -> None:
    sae = random_sae(model, target=target)
    found = amplified(model, tokens, sae, factors=(0.0, 1e3), headline=1e3, new_tokens=12)
    split = halves(len(tokens), 0)
    prompts = tokens[split.test[:3], :5]
    native = sampled(model, prompts, 12, seed=0).tokens
    atoms = found.tables["atoms"].set_index("token")["atom"].to_dict()
    texts = {}
    for token, atom in atoms.items():
        with scale_atoms(model, sae, [atom], 1e3):
            texts[token] = sampled(model, prompts, 12, seed=0).tokens
    for token in atoms:
        other = next(t for t in atoms if t != token)
        for condition, text in (("nothing", native), ("atom", texts[token]), ("other", texts[other])):
            own = found.counts(condition, 1.0 if condition == "nothing" else 1e3).loc[token]
            assert own["count"].tolist() == (text == token).sum(1).tolist()
            assert own["sequence"].tolist() == split.test[:3].tolist()
    assert any(not torch.equal(text, native) for text in texts.values())
    assert found.tables["counts"].groupby(["condition", "factor"]).size().eq(2 * 3).all()


def test_prompts_after_which_the_model_grows_past_its_dtype_are_left_out(
    model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae(model)
    whole = amplified(model, tokens, sae)
    calls = itertools.count()

    def second_prompt_grows(*args: Any, **kwargs: Any) -> Any:
        found = sampled(*args, **kwargs)
        return found._replace(finite=torch.arange(3) != 1) if next(calls) == 2 else found

    monkeypatch.setattr(amplify, "sampled", second_prompt_grows)
    part = amplified(model, tokens, sae)
    kept = whole.tables["counts"].query("prompt != 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(part.tables["counts"], kept)
    assert part.info["omitted"] == {amplify.GREW: 1} and any("Left out: 1 (prompts" in note for note in part.notes())
    assert len(part.claims()) == 2
    monkeypatch.undo()
    later = f"blocks.{LAYER + 1}.hook_resid_post"
    with (
        model.hooks(fwd_hooks=[(later, lambda resid, hook: resid * torch.nan)]),
        pytest.raises(NothingToMeasureError, match=r"after 3 of 3 prompts .* past float64; scale less \(factors: "),
    ):
        amplified(model, tokens, sae)


def test_atoms_that_are_zero_move_nothing(model: Any, tokens: Tensor) -> None:
    sae = random_sae(model)
    sae.w.data.zero_()
    found = amplified(model, tokens, sae)
    first, second = found.claims()
    assert (first.number, first.outcome) == (18, "below the floor") and second.outcome == "inconclusive"  # few prompts
    assert found.change("atom", 4.0).mean == 0 and found.counts("nothing")["fires"].sum() > 0


def test_atoms_are_chosen_on_the_selection_half(model: Any, tokens: Tensor) -> None:
    sae, split = random_sae(model), halves(len(tokens), 0)
    changed = tokens.clone()
    changed[split.test] = tokens[split.test].flip(1)
    one, other = (amplified(model, ids, sae).tables["atoms"] for ids in (tokens, changed))
    same = ["token", "atom", "count", "phi"]
    assert one[same].equals(other[same]) and not one.equals(other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": (3,)}, "tokens needs at least two tokens"),
        ({"factors": (1.0, 4.0)}, "a factor of 1 changes nothing"),
        ({"headline": 3.0}, r"headline must be one of factors \(0.0, 4.0\), found 3.0"),
        ({"aligned": "last"}, "aligned must be 'current' or 'next', found 'last'"),
        ({"prompts": 1}, "prompts must be at least 2, found 1"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AmplifyConfig(**AMPLIFY | changes)


def test_tokens_without_an_atom(model: Any, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token '#5' occurs . times .* no atom left for it fires there 50 times"):
        amplified(model, tokens, random_sae(model), tokens=(5, 6), min_firings=50)
    with pytest.raises(ValueError, match="0 of them have an atom that fires at them 50 times; two are needed"):
        amplified(model, tokens, random_sae(model), min_firings=50)
    with pytest.raises(ValueError, match="token 64 is out of range"):
        amplified(model, tokens, random_sae(model), tokens=(5, 64))


def test_install_settings_that_make_no_sense(model: Any, tokens: Tensor) -> None:
    for changes, message in (
        ({"headline": 2.0}, "headline must be one of sizes"),
        ({"sizes": (3.0, 0.0)}, "sizes are norms and positive"),
        ({"n_positions": 8}, r"n_positions \(8\) is above prompt_tokens \(7\)"),
        ({"semantic": (5,)}, "semantic needs at least two tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            InstallConfig(**INSTALL | changes)
    with pytest.raises(ValueError, match="3 strata x 9 pairs need 27 prompts of 7 tokens, the text gives 18"):
        run_install(model, random_sae(model), tokens, InstallConfig(**INSTALL | {"pairs": 9}), progress=False)
    assert Install.kind == "install"
