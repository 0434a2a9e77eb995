"""Every hook point as data: name, axes, what an edit does. All fire in prefill and in decode.

The hook modules, the documentation and a test that runs each row are all made from ``HOOKS``.
Axes use one alphabet: B batch, T time, S source token, H head, G key-value head of attention, K key channel, V value
channel, D model width, R step of a token.
Where a token takes R > 1 steps (Gated DeltaProduct; ``model.cfg.layer(l).R``), factors have an axis for them, and so
have the factors of the write: its R terms are what each step writes as the later steps of the token leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

HookPlace = Literal["model", "block", "mixer", "head", "attn"]


@dataclass(frozen=True)
class HookRow:
    """One row of the table."""

    name: str
    """Name inside its scope, for example ``hook_write``."""
    scope: HookPlace
    """Where it lives: the model, a block, a recurrent mixer, one head of a mixer, or an attention layer."""
    axes: str
    """Axes of the activation, one letter each; ``(KV)`` is one row-major axis of length K*V."""
    meaning: str
    """What the activation is, with sign and units."""
    edit: str
    """What returning something else does."""
    matrix: bool = False
    """True for activations that hold a matrix per token (K x V), or a number for each token before it (patterns): built
    only for a listener, and left out of ``run_with_cache`` unless named."""
    factor: str | None = None
    """What of the rule this hook shows: a field of ``rules.OpFactors``, or "a" or "b" of the canonical form. The hook
    exists only where the rule has it (``Rule.hook_factors``)."""
    per_step: bool = False
    """Whether there is one for each step of a token, where tokens take several."""

    def axes_of(self, rank: int) -> str:
        """Axes where a token takes ``rank`` steps: ``BTHRK`` for ``BTHK``, ``BTHR`` for ``BTH``, ``BHTSR``."""
        stepped = self.axes.replace("BTH", "BTHR", 1).replace("BHTS", "BHTSR")
        return stepped if self.per_step and rank > 1 else self.axes

    def full_name(self, layer: int | str = "{l}", head: int | str = "{h}") -> str:
        """The name on a model: ``HookRow.full_name(1, 2) == "blocks.1.mixer.heads.2.hook_write"``."""
        prefixes = {
            "model": "",
            "block": f"blocks.{layer}.",
            "mixer": f"blocks.{layer}.mixer.",
            "head": f"blocks.{layer}.mixer.heads.{head}.",
            "attn": f"blocks.{layer}.attn.",
        }
        return prefixes[self.scope] + self.name


_FEEDS = "feeds the recurrence: outputs and state follow"
_ERASES = (
    "the pass is computed by hookpoints' own kernel with the edited erase, since ops make theirs of other arguments; "
    "outputs and state follow, the write does not"
)
_PROPAGATES = "propagates: later states and reads follow under the full transition (closed loop)"
_CARRIED = (
    "what is added to it is added to the state before t and carried on: later states, reads and the state passed "
    "to generation follow under the full transition (closed loop). Differences at several tokens add up"
)
_TRAJECTORY = (
    "the returned trajectory is what reads see, and its last state is passed to generation; it does not "
    "propagate between tokens (use hook_state_in for that)"
)

HOOKS: tuple[HookRow, ...] = (
    HookRow("hook_embed", "model", "BTD", "token embeddings", "feeds the first block"),
    HookRow("hook_resid_pre", "block", "BTD", "residual stream entering the block", "feeds the block"),
    HookRow("hook_q", "mixer", "BTHK", "read vector, normalized as the rule does, unscaled", _FEEDS, factor="q"),
    HookRow(
        "hook_k",
        "mixer",
        "BTHK",
        "key, normalized; the rule writes with it, and erases with it unless it has its own key for that (RWKV-7)",
        _FEEDS,
        factor="k",
        per_step=True,
    ),
    HookRow("hook_v", "mixer", "BTHV", "value, before beta", _FEEDS, factor="v", per_step=True),
    HookRow(
        "hook_beta",
        "mixer",
        "BTH or BTHV",
        "write strength, >= 0; one for each value channel in Mamba-1 and Gated DeltaNet-2",
        _FEEDS,
        factor="beta",
        per_step=True,
    ),
    HookRow(
        "hook_log_decay",
        "mixer",
        "BTH or BTHK or BTHV",
        "natural log of the factor that multiplies the old state, <= 0; in Mamba-1 and HGRN (BTHV) it is that of a "
        "rate of 1, and each entry of the state has a rate",
        _FEEDS,
        factor="log_decay",
    ),
    HookRow(
        "hook_erase_a",
        "mixer",
        "BTHK",
        "where the erase acts: a in S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T, -beta k in the delta rules. With a 0 "
        "nothing is erased; with log_decay and the write 0 too, the token leaves the state as it is",
        _ERASES,
        factor="a",
        per_step=True,
    ),
    HookRow(
        "hook_erase_b",
        "mixer",
        "BTHK",
        "what the erase reads the state S_{t-1} with: b in a b^T, alpha k in the delta rules",
        _ERASES,
        factor="b",
        per_step=True,
    ),
    HookRow(
        "hook_write_key",
        "mixer",
        "BTHK",
        "key side of the write k u^T (the erase keeps its own key)",
        _PROPAGATES,
        per_step=True,
    ),
    HookRow(
        "hook_write_value",
        "mixer",
        "BTHV",
        "value side u of the write k u^T, beta included",
        _PROPAGATES,
        per_step=True,
    ),
    HookRow("hook_write", "mixer", "BTHKV", "the write: the matrix added to the state at t", _PROPAGATES, matrix=True),
    HookRow("hook_write", "head", "BTKV", "the write of one head", _PROPAGATES, matrix=True),
    HookRow(
        "hook_write_vec",
        "head",
        "BT(KV)",
        "the write of one head, flattened row-major: the layout that SAELens stores, trains on and patches",
        _PROPAGATES,
        matrix=True,
    ),
    HookRow(
        "hook_state_in",
        "mixer",
        "BTHKV",
        "the state that token t finds, S_{t-1}: before the first token zeros, or what the cache holds",
        _CARRIED,
        matrix=True,
    ),
    HookRow("hook_state_in", "head", "BTKV", "the state that token t finds, of one head", _CARRIED, matrix=True),
    HookRow("hook_state", "mixer", "BTHKV", "the state after the write at t", _TRAJECTORY, matrix=True),
    HookRow("hook_state", "head", "BTKV", "the state of one head", _TRAJECTORY, matrix=True),
    HookRow("hook_state_vec", "head", "BT(KV)", "the state of one head, flattened row-major", _TRAJECTORY, matrix=True),
    HookRow(
        "hook_pattern",
        "mixer",
        "BHTS or BVTS",
        "attention of the recurrent head: the weight A with which token t reads the value u of the write at s, exactly "
        "o = A u; it has a sign and is not normalized. S counts all tokens so far. In Mamba-1 and HGRN (BVTS) "
        "each value channel has its own",
        "the reads follow, o + (A' - A) u; the state does not change",
        matrix=True,
        per_step=True,
    ),
    HookRow("hook_read", "mixer", "BTHV", "what the state returns: S^T (scale q)", "feeds the head norm and out_proj"),
    HookRow(
        "hook_z",
        "mixer",
        "BTHV",
        "what each head hands to out_proj, head norm and gate included: times W_O and summed it is hook_mixer_out",
        "feeds out_proj",
    ),
    HookRow(
        "hook_q",
        "attn",
        "BTHK",
        "query of softmax attention as projected, before its norm (where it has one) and rotary embedding, unscaled",
        "feeds the attention",
    ),
    HookRow(
        "hook_k",
        "attn",
        "BTGK",
        "key of softmax attention, of each key-value head, as projected: before its norm and rotary embedding",
        "feeds the attention, and the cache of generation",
    ),
    HookRow(
        "hook_v",
        "attn",
        "BTGV",
        "value of softmax attention, of each key-value head",
        "feeds the attention, and the cache of generation",
    ),
    HookRow(
        "hook_pattern",
        "attn",
        "BHTS",
        "attention of a softmax head: the weight with which token t reads the value at s. S counts what the layer's "
        "cache holds",
        "the outputs follow, o + (A' - A) v",
        matrix=True,
    ),
    HookRow(
        "hook_z",
        "attn",
        "BTHV",
        "what each attention head hands to the output projection, gate included (blocks with attention only)",
        "feeds the output projection",
    ),
    HookRow(
        "hook_mixer_out",
        "block",
        "BTD",
        "what a recurrent mixer adds to the residual stream (recurrent blocks only)",
        "adds to the residual stream",
    ),
    HookRow(
        "hook_attn_out",
        "block",
        "BTD",
        "what the token mixer adds to the residual stream, in TransformerLens' words; where attention and recurrence "
        "run side by side, attention's part",
        "adds to the residual stream",
    ),
    HookRow("hook_mlp_out", "block", "BTD", "what the MLP adds to the residual stream", "adds to the residual stream"),
    HookRow("hook_resid_post", "block", "BTD", "residual stream leaving the block", "feeds the next block"),
    HookRow("ln_final.hook_normalized", "model", "BTD", "output of the final norm", "feeds the unembedding"),
)
"""The table, in order of execution."""


def rows(scope: HookPlace) -> Iterator[HookRow]:
    """The rows of one scope, in order of execution."""
    return (row for row in HOOKS if row.scope == scope)


def is_matrix(name: str) -> bool:
    """Whether the full hook name ``name`` is a matrix or a pattern (large; built only on demand)."""
    return name.rsplit(".", 1)[-1] in _MATRIX_NAMES


def time_axis(name: str) -> int:
    """Which axis of the activation at the hook ``name`` is T: 2 for patterns, as in TransformerLens, else 1."""
    return 2 if name.endswith("hook_pattern") else 1


_MATRIX_NAMES = frozenset(row.name for row in HOOKS if row.matrix)
