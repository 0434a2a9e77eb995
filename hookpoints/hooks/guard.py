"""Hooks that must act: names are checked before a run, and hooks that stayed silent after it."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from hookpoints.errors import HookDidNotFireError, HookShapeError, InputError, UnknownHookError, nearest
from hookpoints.hooks.cache import NamesFilter, Saving
from hookpoints.hooks.points import mark_reading, scopes_of
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import LensHandle

    from hookpoints.layer.context import HookScope

Hook = Callable[..., object]
"""Called with an activation and ``hook=`` its hook point; returns another activation, or None to leave it."""
Name = str | Callable[[str], bool]
"""A hook's name, or a predicate on names."""
HookSpecs = Sequence[tuple[Name, Hook]]
NamedHooks = Sequence[tuple[str, Hook]]
Way = Literal["fwd", "bwd"]

ADDING = threading.RLock()
"""Held while hooks are put on points or taken off."""


def canonical(name: str, known: Container[str]) -> str:
    """The hook in ``known`` that ``name`` is TransformerLens' way to spell, or ``name`` itself.

    ``transformer_lens.utils.get_act_name`` puts names into ``blocks.{l}.attn.`` ("z", "q", "pattern") or
    ``blocks.{l}.`` ("write", "read", "heads.1.write_vec"); on a recurrent layer these are hooks of its mixer.
    """
    spelt = None if name in known else _SPELT.fullmatch(name)
    if spelt is None:
        return name
    layer, heads, hook = spelt.groups()
    inside = f"blocks.{layer}.mixer.{heads or ''}hook_{hook}"
    return inside if inside in known else name


_SPELT = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(heads\.\d+\.)?(?:hook_)?(\w+)")


def find_hooks(model: HookedRootModule, name: Name) -> list[str]:
    """The hook that ``name`` is (see ``canonical``), or those for which a predicate on names holds.

    Raises:
        UnknownHookError: no hook of ``model`` is named so, or the predicate holds for none.
    """
    if callable(name):
        matching = [known for known in model.hook_dict if name(known)]
        if not matching:
            raise UnknownHookError(
                f"the filter {name!r} matches none of the {len(model.hook_dict)} hooks of this model, or none within "
                "start_at_layer and stop_at_layer"
            )
        return matching
    name = canonical(name, model.mod_dict)
    if not hasattr(model.mod_dict.get(name), "add_hook"):
        block, _, inside = name.partition(".mixer.")
        absent = inside and block in model.mod_dict and f"{block}.mixer" not in model.mod_dict
        why = f": {block.replace('s.', ' ')} has no recurrence" if absent else nearest(name, model.hook_dict)
        raise UnknownHookError(f"this model has no hook named {name!r}{why}")
    return [name]


def find_all_hooks(model: HookedRootModule, names: NamesFilter) -> NamesFilter:
    """The hooks that a filter means, each as `find_hooks` has it; None stays.

    Raises:
        UnknownHookError: a name or a predicate that matches none. An empty list asks for none.
    """
    if names is None:
        return None
    several = [names] if isinstance(names, str) or callable(names) else names
    return [hook for name in several for hook in find_hooks(model, name)]


def named_hooks(model: HookedRootModule, what: str, specs: HookSpecs) -> NamedHooks:
    """Each hook of ``specs`` with its name, a predicate's with all that it matches.

    Raises:
        InputError: ``specs`` are no pairs of a name and a function; calls them ``what``.
        UnknownHookError: as `find_hooks` does.
    """
    named: list[tuple[str, Hook]] = []
    for pair in specs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise InputError(f"{what}: expected a list of pairs (name, hook), got {specs!r:.80}; write [(name, hook)]")
        named += [(name, pair[1]) for name in find_hooks(model, pair[0])]
    return named


@scoped
def scoped_hooks(
    scope: HookScope,
    points: Mapping[str, nn.Module],
    landmarks: Sequence[nn.Module],
    fwd: NamedHooks,
    bwd: NamedHooks,
    stay: bool = False,
) -> Iterator[None]:
    """Hooks that act inside one scope, and are missed if they never do.

    Args:
        scope: hooks act in the thread (more exactly, the context) in which it is open; others run as if they were not
            there. A scope that an interrupt closed in passing leaves hooks that do nothing.
        points: hook points by name.
        landmarks: modules whose outputs every gradient passes that passes a hook point; they tell a backward pass.
        stay: hooks stay in force after the scope, everywhere (TransformerLens' ``reset_hooks_end=False``).

    Raises:
        HookDidNotFireError: the model ran in the scope and a forward hook was never called, or a backward pass went
            through it and a backward hook never was.
    """
    from transformer_lens.hook_points import HookPoint  # loaded with the model that has the points

    called: set[tuple[str, Way]] = set()
    gone_backward: list[bool] = []
    handles: list[tuple[HookPoint, LensHandle]] = []

    def watched(name: str, way: Way, hook: Hook) -> Hook:
        @functools.wraps(hook, updated=())
        def call(*args: object, **kwargs: object) -> object:
            if not (stay or scope.active()):
                return None
            called.add((name, way))
            try:
                return hook(*args, **kwargs)
            except IndexError as error:  # TransformerLens' patching counts on as many heads in every block
                shape = list(args[0].shape) if args and isinstance(args[0], Tensor) else None
                raise HookShapeError(
                    f"a hook on {name}, whose value is {shape}, asked for an index that is not there ({error}). Blocks "
                    "may have different numbers of heads (model.cfg.layers, model.cfg.attention): name the places in "
                    "an index_df"
                ) from error

        return call

    def mark(_module: nn.Module, _args: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.requires_grad and scope.active():
            value.register_hook(lambda _: gone_backward.append(True))

    marks = [module.register_forward_hook(mark) for module in (landmarks if bwd else ())]
    both = list[tuple[Way, str, Hook]]()
    for name, hook in fwd:
        both.append(("fwd", name, hook))
    for name, hook in bwd:
        both.append(("bwd", name, hook))
    try:
        for way, name, hook in both:
            point = points[name]
            assert isinstance(point, HookPoint), f"{name} holds {type(point).__name__}, which takes no hooks"
            with ADDING:
                point.add_hook(watched(name, way, hook), dir=way)
                handles.append((point, (point.fwd_hooks if way == "fwd" else point.bwd_hooks)[-1]))
                if way == "fwd" and isinstance(hook, Saving):
                    mark_reading(point, handles[-1][1].hook)
                if not stay:
                    scopes_of(point).append(scope)
        yield
    finally:
        for landmark in marks:
            landmark.remove()
        for point, handle in [] if stay else handles:
            with ADDING:  # the scope first: a hook that an interrupt leaves behind without one only costs time
                if scope in scopes_of(point):
                    scopes_of(point).remove(scope)
                for visible in (point.fwd_hooks, point.bwd_hooks):
                    if handle in visible:  # else reset_hooks took it off
                        visible.remove(handle)
                        handle.hook.remove()
    if scope.passes and (silent := [name for name, _ in fwd if (name, "fwd") not in called]):
        raise HookDidNotFireError(
            f"{len(silent)} hook(s) never fired though the model ran: {', '.join(silent[:3])}. Was the layer "
            "outside start_at_layer / stop_at_layer, or is an SAE attached there (then hook its inner points)?"
        )
    if gone_backward and (silent := [name for name, _ in bwd if (name, "bwd") not in called]):
        raise HookDidNotFireError(
            f"{len(silent)} backward hook(s) never fired though a backward pass ran: {', '.join(silent[:3])}. What was "
            "differentiated does not depend on that activation: was the layer above stop_at_layer, or the activation "
            "replaced by a forward hook?"
        )
