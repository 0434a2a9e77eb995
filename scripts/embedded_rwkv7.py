"""RWKV-7: the model called `embedded-rwkv7` (this package's own class, with fla's format of checkpoints)."""

import torch
from embedded_family import TRAINING_CHUNK, Family, Op, Transition
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM, layers


def build(vocabulary: int, end_of_text: int) -> PreTrainedModel:
    """RWKV-7 of about the same size. Decays begin as in the paper: slow in the first heads, fast in the last."""
    config = RWKV7Config(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size=768,
        decay_low_rank_dim=32,
        a_low_rank_dim=32,
        v_low_rank_dim=16,
        gate_low_rank_dim=48,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return RWKV7ForCausalLM(config)


def fast_recurrence(
    _: Op, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **__: object
) -> tuple[Tensor, None]:
    """The recurrence with the same result, made to train fast; T must be a whole number of chunks.

    Log-decays are above -0.61 a token, so that over a chunk of 32 they cumulate to no less than -19.5: keys can be
    divided by the cumulated decay in fp32. All that does not depend on the state is done for all chunks at once, the
    triangular system included; what is left for the loop is one affine map of the state a chunk, S <- M S + U.
    """
    size, width, count = TRAINING_CHUNK, v.shape[-1], k.shape[1] // TRAINING_CHUNK

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, n, C, D], a view
        return x.transpose(1, 2).unflatten(2, (-1, size))

    def joined(*parts: Tensor) -> Tensor:  # -> [B H n, parts, C, D]
        return torch.stack([chunks(part.float()) for part in parts], dim=-3).flatten(0, 2)

    v = chunks(v.float()).reshape(-1, size, width)
    decay = joined(w)[:, 0].cumsum(1).exp()  # [., C, K], from before the chunk to after each token
    met = torch.stack([F.pad(decay[:, :-1], (0, 0, 1, 0), value=1.0), decay], dim=1)
    reads = (joined(a, r) * met).flatten(1, 2)  # [., 2 C, K]: what the erase reads, what the layer reads
    writes = joined(b, k) / decay[:, None]
    erased, written = writes.unbind(1)
    order = torch.ones(size, size).tril()
    order = torch.cat([order.tril(-1), order]).repeat(1, 2)  # the erase reads before the write, the layer after it
    by_erase, by_write = (reads @ writes.flatten(1, 2).mT * order).split(size, dim=2)
    (system, seen), (right, base) = (x.split(size, dim=1) for x in (by_erase, torch.cat([by_write @ v, reads], dim=-1)))
    # What each token reads back before it writes is affine in the state before the chunk: [., C, V + K].
    back = torch.linalg.solve_triangular(-system, right, upper=False, unitriangular=True)
    fixed, linear = torch.baddbmm(base, seen, back).split([width, k.shape[-1]], dim=-1)
    update, transition = (erased.mT @ back).split([width, k.shape[-1]], dim=-1)
    whole = decay[:, -1, :, None]
    update = (whole * torch.baddbmm(update, written.mT, v)).unflatten(0, (-1, count))
    transition = (whole * (transition + torch.eye(k.shape[-1]))).unflatten(0, (-1, count))
    state, states = torch.zeros_like(update[:, 0]), []
    for matrix, new in zip(transition.unbind(1), update.unbind(1), strict=True):
        states.append(state)
        state = torch.baddbmm(new, matrix, state)
    read = torch.baddbmm(fixed, linear, torch.stack(states, dim=1).flatten(0, 1))
    return read.unflatten(0, (-1, k.shape[2], count)).flatten(2, 3).transpose(1, 2), None


def read(*, w: Tensor, k: Tensor, a: Tensor, b: Tensor, **_: object) -> Transition:
    """RWKV-7: alpha = exp(w) for each key channel; the erase reads back with its own key -a, not with the key k that
    is written, and takes the share -<a, b> off along it."""
    a, b = a.float(), b.float()
    return Transition(key=k.float(), alpha=w.float().exp(), write=-(a * b).sum(-1), a=b, b=a)


RWKV7 = Family(
    title="RWKV-7",
    model_class=RWKV7ForCausalLM,
    build=build,
    gates=("w_lora.lora.0.weight", "w_lora.lora.2.weight", "w_lora.lora.2.bias"),
    write_name="erase",
    architecture=(
        "Four RWKV-7 layers of 6 heads, K = V = 32, each followed by a feed-forward layer of 768. The library is this\n"
        "package (`hookpoints.rwkv7`); the checkpoint has flash-linear-attention's format."
    ),
    recurrence_formula="alpha p - a kappa <kappa, p>",
    module=layers,
    op="rwkv7_recurrence",
    read=read,
    train=fast_recurrence,
)
