"""SAEs that replace hook points: SAELens' `add_sae` and `run_with_saes` on recurrent models."""

from __future__ import annotations

from typing import Any, cast

from sae_lens import HookedSAETransformer

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.target import Dictionary, check_hook


class HookedSAERecurrent(HookedRecurrent):
    """A HookedRecurrent to which SAEs can be attached, with SAELens' own methods.

    `reset_saes`, `run_with_saes`, `run_with_cache_with_saes`, `run_with_hooks_with_saes` and the scope `saes` are those
    of `sae_lens.HookedSAETransformer`, unchanged: they need a tree of hook points, not a transformer. `add_sae`, which
    all of them call, checks first that the SAE fits. An SAE on a head's write runs at each token of prefill and
    generation; with the error term it leaves the model's outputs as they were. Without it, `hook_sae_error` never
    fires, and is not among the hooks.
    """

    reset_saes = HookedSAETransformer.reset_saes
    run_with_saes = HookedSAETransformer.run_with_saes
    run_with_cache_with_saes = HookedSAETransformer.run_with_cache_with_saes
    run_with_hooks_with_saes = HookedSAETransformer.run_with_hooks_with_saes
    saes = HookedSAETransformer.saes
    acts_to_saes = HookedSAETransformer.acts_to_saes
    _reset_sae = HookedSAETransformer._reset_sae
    _compute_exclusion_mask = HookedSAETransformer._compute_exclusion_mask
    _token_masks = HookedSAETransformer._token_masks

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._acts_to_saes: dict[str, Any] = {}
        self._transcoder_output_hooks: dict[str, str] = {}

    def setup(self) -> None:
        super().setup()
        wrappers = getattr(self, "_acts_to_saes", {}).values()
        # Among the hooks, one that never fires would raise.
        for name in [wrapper.hook_sae_error.name for wrapper in wrappers if not wrapper.use_error_term]:
            del self.hook_dict[name], self.mod_dict[name]

    def add_sae(self, sae: Dictionary, *args: Any, **kwargs: Any) -> None:
        """SAELens' `add_sae`, which runs without the SAE where the model lacks its hook.

        Raises:
            UnknownHookError: this model lacks the SAE's hook.
            ValueError: the hook carries matrices of another size, or its layer is on another device than the SAE, which
                stays where it is, as in SAELens.
        """
        name = str(sae.cfg.metadata.hook_name)
        if name not in self._acts_to_saes:
            check_hook(self, name, sae.cfg)
        place = self.hook_device(name)
        got = next(sae.parameters()).device
        if got != place and place.type != "meta":
            raise ValueError(f"sae: expected one on {place}, as {name}, got one on {got}; move it: sae.to('{place}')")
        HookedSAETransformer.add_sae(cast(Any, self), sae, *args, **kwargs)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """`HookedRecurrent.forward` with the attached SAEs."""
        with self._token_masks(input, kwargs):  # type: ignore[attr-defined]
            return super().forward(input, *args, **kwargs)
