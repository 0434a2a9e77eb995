"""The writes of a model that hold facts, and facts that are to be other ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hookpoints import HookedRecurrent, zoo
from writesae_study.known.sides import HeadCode


class World(NamedTuple):
    """The writes of a model of the zoo that hold facts, and what they hold."""

    model: HookedRecurrent
    task: Any
    holder: zoo.Holder
    pairs: int
    keys: Tensor
    """[H,N,K]"""
    values: Tensor
    """[H,N,V]"""
    key_symbols: Tensor
    """[N]"""
    value_symbols: Tensor
    """[N]"""

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, sequences: int) -> World:
        """Writes of fresh sequences of a middling size. All is on the host: the models are tiny, and scikit-learn takes
        nothing else."""
        task = zoo.task(name)
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        holder = max(zoo.truth(name).holders, key=lambda each: len(each.heads))  # of the key or of the value
        pairs = task.sizes[2 * len(task.sizes) // 3]["pairs"]
        batch = task.batch(sequences, torch.Generator().manual_seed(9), pairs=pairs)  # pyright: ignore[reportCallIssue]
        recurrence = model.recurrence(batch.tokens, holder.layer)
        at = batch.places[holder.holds][:, :-1] + holder.offset  # without the last pair, whose write sees the question

        def of_heads(side: Tensor) -> Tensor:
            """[B,T,H,D] as [H',N,D]."""
            written = side[torch.arange(sequences)[:, None], at][:, :, list(holder.heads)]
            return written.flatten(0, 1).transpose(0, 1)

        return cls(
            model=model,
            task=task,
            holder=holder,
            pairs=pairs,
            keys=of_heads(recurrence.k),
            values=of_heads(recurrence.u),
            key_symbols=batch.symbols["keys"][:, :-1].flatten(),
            value_symbols=batch.symbols["values"][:, :-1].flatten(),
        )

    @property
    def n_subjects(self) -> int:
        """Subjects of facts: names. A key is one, or one with a relation."""
        return getattr(self.task, "n_names", self.task.n_keys)

    def subjects(self, keys: Tensor) -> Tensor:
        """Of keys [...]."""
        return keys // (self.task.n_keys // self.n_subjects)

    def parts(self, values: Tensor) -> Tensor:
        """Which of S symbols values [...] are made of [...,S], 0 or 1: itself, or an attribute of each slot."""
        if not hasattr(self.task, "attributes"):
            return one_hot(values, self.task.n_values).float()
        return one_hot(self.task.attributes(values), self.task.n_attributes).flatten(-2).float()


class FactChanges(NamedTuple):
    """B sequences, in each of which one fact is to be another one."""

    base: zoo.Batch
    asked: Tensor
    """[B] the pair."""
    at: Tensor
    """[B] the token at which it is written."""
    new: Tensor
    """[B] its new value."""
    questions: dict[str, zoo.Batch]
    """What is asked, and what is right afterwards: "changed" for the fact, "kept" for another one, and where values
    have attributes "other attributes" of the same."""

    @classmethod
    def draw(cls, world: World, n: int) -> FactChanges:
        """One attribute is another one, or the whole value."""
        task = world.task
        holder = world.holder
        generator = torch.Generator().manual_seed(5)
        symbols = dict(task.batch(n, generator, pairs=world.pairs).symbols)
        symbols["asked"] %= world.pairs - 1
        asked = symbols["asked"]
        old = symbols["values"].gather(1, asked)
        new = task.others(old, generator)
        kept = task.spell(symbols | {"asked": (asked + 1) % (world.pairs - 1)})
        further = {}
        if "slots" in symbols:
            unit = task.n_attributes ** (2 - symbols["slots"])
            new = old + unit * (new // unit % task.n_attributes - old // unit % task.n_attributes)
            further["other attributes"] = task.spell(symbols | {"slots": (symbols["slots"] + 1) % 3})
        base = task.spell(symbols)
        changed = task.spell(symbols | {"values": symbols["values"].scatter(1, asked, new)})
        return cls(
            base=base,
            asked=asked[:, 0],
            at=base.places[holder.holds].gather(1, asked)[:, 0] + holder.offset,
            new=new[:, 0],
            questions={"changed": changed, "kept": kept, **further},
        )

    @torch.no_grad()
    def ask(self, world: World, writes: Tensor | None) -> dict[str, Tensor]:
        """Whether the model answers right [B], by question, with writes [B,H,K,V] instead of the asked pair's."""
        rows = torch.arange(len(self.new))
        end = int(self.base.places["values"].max()) + 1

        def replace(native: Tensor, hook: object) -> Tensor:
            assert writes is not None
            native = native.clone()
            native[rows[:, None], self.at[:, None], list(world.holder.heads)] = writes
            return native

        hook = f"blocks.{world.holder.layer}.mixer.hook_write"
        hooks: list[Any] = [] if writes is None else [(hook, replace)]
        right = {}
        for name, question in self.questions.items():
            text = torch.cat([self.base.tokens[:, :end], question.tokens[:, end:]], 1)
            logits = world.model.run_with_hooks(text, fwd_hooks=hooks)
            answers = logits[rows, question.positions[:, 0]].argmax(-1)
            right[name] = answers == question.answers[:, 0]
        return right

    def writes(self, world: World, codes: Sequence[HeadCode], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What each head [B,H,K,V] writes for the new fact, and where that is known [B].

        Whole values: the code of another write of the same fact. Attributes: the native write, with the atom of the
        old attribute exchanged for that of the new one, along the native key.
        """
        if "slots" in self.base.symbols:
            return self._with_attribute(world, vectors), torch.ones(len(self.new), dtype=torch.bool)
        donors = self._donor_writes(world)
        return torch.stack([code.written[donors] for code in codes], 1), donors >= 0

    def _asked_keys(self) -> Tensor:
        return self.base.symbols["keys"].gather(1, self.asked[:, None])[:, 0]

    def _donor_writes(self, world: World) -> Tensor:
        """[B] numbers of writes that hold the new facts; -1 where there is none."""
        held = zip(world.key_symbols.tolist(), world.value_symbols.tolist())
        number = {fact: n for n, fact in enumerate(held)}
        wanted = zip(self._asked_keys().tolist(), self.new.tolist())
        return torch.tensor([number.get(fact, -1) for fact in wanted])

    def _with_attribute(self, world: World, vectors: Sequence[Tensor]) -> Tensor:
        """[B,H,K,V] native writes whose old attribute is replaced by the new one."""
        recurrence = world.model.recurrence(self.base.tokens, world.holder.layer)
        rows = torch.arange(len(self.new))
        heads = list(world.holder.heads)
        k = recurrence.k[rows, self.at][:, heads]
        u = recurrence.u[rows, self.at][:, heads]
        old = self.base.symbols["values"][rows, self.asked]
        change = world.parts(self.new) - world.parts(old)  # [B,S]
        key = self._asked_keys()
        delta = torch.stack([torch.einsum("bs,bsv->bv", change, each[key]) for each in vectors], 1)
        return k[..., None] * (u + delta)[:, :, None]
