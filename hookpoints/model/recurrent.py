"""HookedRecurrent: a Hugging Face recurrent language model with hook points on its memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hookpoints.edits.edit import EditRow, EditRows, Edits, as_rows
from hookpoints.edits.session import EditedRun, EditSession, run_alone
from hookpoints.errors import InputError
from hookpoints.layer.context import Backend, StopForward, cache_among
from hookpoints.memory.memory import Memory, read
from hookpoints.model.attachment import Attachment
from hookpoints.model.inputs import as_tokens, cache_argument, check_loss, check_mask, check_tokens, continuing
from hookpoints.model.layout import find_layout
from hookpoints.model.refused import check_forward_arguments, generation_arguments
from hookpoints.model.selfcheck import choose_cache
from hookpoints.model.selfcheck import self_check as run_self_check
from hookpoints.model.tokens import PaddingSide, TokenBatch, Tokens
from hookpoints.model.weights import Weights
from hookpoints.model.wrappers import unwrap
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.refused import Explaining

ReturnType = Literal["logits", "loss", "both"] | None


class Output(NamedTuple):
    """What ``return_type="both"`` returns, as TransformerLens 3 has it (4 has no name for it)."""

    logits: Tensor
    """[B,T,vocab]."""
    loss: Tensor
    """A scalar, or [B,T-1] with ``loss_per_token``."""


class HookedRecurrent(Explaining, Tokens, Weights):
    """Hook points on the writes, states and reads of a recurrent language model, and on its residual stream.

    ``hookpoints.HOOKS`` lists every hook: name, axes, when it fires and what an edit does. The model inside,
    ``hf_model``, stays as it is: with no hooks attached its outputs are bit-identical to the unhooked model's.

        >>> from hookpoints import HookedRecurrent
        >>> model = HookedRecurrent.from_pretrained("embedded")
        >>> logits, cache = model.run_with_cache("The state of the Union", names_filter="blocks.1.mixer.hook_k")
    """

    hook_embed: nn.Module
    blocks: nn.ModuleList
    ln_final: nn.Module

    def __getattr__(self, name: str) -> Any:
        if isinstance(of_class := getattr(type(self), name, None), property) and of_class.fget is not None:
            return of_class.fget(self)  # it raised an AttributeError, which nn.Module would take for an absent name
        return super().__getattr__(name)

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        backend: Backend = "auto",
        self_check: bool = True,
    ):
        super().__init__()
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        attachment = Attachment(hf_model, find_layout(hf_model), self, backend)
        check = partial(run_self_check if self_check else choose_cache, self)
        can_run = next(hf_model.parameters()).device.type != "meta"
        self._attach_hooks(attachment, name, backend, check if can_run else None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        backend: Backend = "auto",
        self_check: bool = True,
        trainable: bool = False,
        **hf_kwargs: object,
    ) -> HookedRecurrent:
        """Load a model from the hub, a local folder, the package ("embedded"), or an official RWKV-7 file (``.pth``).

        Args:
            device: where to put it; default CUDA if there is one. Leave out with ``device_map``. "meta": no weights are
                read; ``cfg`` and the hooks' names are there, and nothing can be run.
            dtype: one of torch, or its name; "auto" keeps the checkpoint's own. None: float32, as in TransformerLens.
                ``torch_dtype`` is the same.
            revision: branch, tag or commit on the hub.
            backend: who computes the native pass of recurrent layers: "auto" (upstream's op), "torch" (upstream's torch
                op on any device) or "recurrence" (hookpoints' own kernel; float64 throughout on a float64 model).
            self_check: run a few tokens and prove that hooks see what the model does (a second or so). False: one token
                is run, to see whether upstream's own cache serves.
            trainable: keep the parameters trainable. By default they are frozen (``requires_grad`` is False), so that
                runs in grad mode hold what hooks keep and no more; otherwise each cached tensor holds the graph of its
                pass, 8 to 25 times as much. Backward hooks work either way.
            hf_kwargs: passed to ``AutoModelForCausalLM.from_pretrained``; ``device_map`` for instance.

        Raises:
            InputError: an argument of TransformerLens' that means nothing here (``fold_ln=True``); says what does it.
                Also for a dtype or a device that there is not, and for two dtypes.
            UnknownModelError: there is no such model; names the nearest.
            UnsupportedModelError: the model has no recurrence of the canonical form; says why.
            SelfCheckError: the model does not behave as hooks need.
        """
        from hookpoints.model import loading  # takes seconds

        name = os.fspath(name_or_path)
        loaded = loading.load(name, device=device, dtype=dtype, revision=revision, **hf_kwargs)
        model = cls(loaded.model, loaded.tokenizer, name=name, backend=backend, self_check=self_check)
        return model if trainable else model.requires_grad_(False)

    @classmethod
    def from_pretrained_no_processing(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> HookedRecurrent:
        """``from_pretrained``, which never processes weights, under TransformerLens' names for that."""
        return cls.from_pretrained(name_or_path, **kwargs)

    boot_transformers = from_pretrained_no_processing

    @classmethod
    def from_hf(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        trainable: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Hook a model that is already loaded. The model itself is used, not a copy; it is set to eval mode, and its
        parameters are frozen (adapters of PEFT too) unless ``trainable``, which leaves their ``requires_grad`` as it
        is. `from_pretrained` says what that costs.

        Of a model that is compiled, or wrapped by DistributedDataParallel, PEFT or nnsight, the one inside is used.
        """
        hooked = cls(unwrap(model), tokenizer, **kwargs)
        return hooked if trainable else hooked.requires_grad_(False)

    def origin(self) -> dict[str, str | None]:
        """Where the model is to be had again, and which it is: ``model_name`` (a folder as an absolute path),
        ``revision`` (the commit on the hub) and `fingerprint`. Cost: a reading of all weights."""
        from hookpoints.model.loading import whole_name

        return {
            "model_name": whole_name(self.cfg.model_name),
            "revision": getattr(self.hf_model.config, "_commit_hash", None),
            "fingerprint": self.fingerprint(),
        }

    # -- running

    def forward(
        self,
        input: str | list[str] | Tensor,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        memory: Memory | None = None,
        **hf_kwargs: object,
    ) -> Any:
        """Run the model.

        Args:
            input: text, token ids [B,T], or with ``start_at_layer`` the residual stream [B,T,D] entering that block.
            return_type: "logits" [B,T,vocab], "loss", "both" (logits, loss), or None.
            loss_per_token: loss [B,T-1] instead of its mean.
            start_at_layer, stop_at_layer: run blocks start <= l < stop only; negative counts from the end. With
                ``stop_at_layer`` the residual stream entering that block is returned.
            tokens: token ids [B,T], needed with ``start_at_layer`` for a loss, and for models that hand the token
                embeddings to later blocks (Zamba2).
            attention_mask: [B,T]; made by itself for text that needs padding.
            memory: read on from here (see `memory`); it stays as it is. Text is then given no first token (bos), unless
                asked for. Not with padding, nor with your own cache.
            hf_kwargs: for the Hugging Face forward (a cache, position_ids ...).

        Raises:
            InputError: an argument that neither this nor the Hugging Face forward takes; names the nearest, and the
                call that takes it.
        """
        if hf_kwargs:
            check_forward_arguments(hf_kwargs, self.hf_model, HookedRecurrent.forward)
        start = self._layer_index(start_at_layer, 0)
        stop = self._layer_index(stop_at_layer, self.cfg.n_layers)
        # The input is text or tokens, which the model embeds itself, or the residual stream that a later block reads.
        residual = None
        if start_at_layer is not None:
            if not isinstance(input, Tensor) or input.ndim != 3:
                raise ValueError("with start_at_layer the input is the residual stream [B,T,D] entering that block")
            residual = input
        else:
            tokens, attention_mask = self._token_batch(input, prepend_bos, padding_side, attention_mask, memory)
            if attention_mask is not None:
                check_mask(attention_mask, tokens, cached=cache_among(*hf_kwargs.values()) is not None)
        inputs = {"input_ids": tokens} if residual is None else {"inputs_embeds": residual}
        # Where later blocks read the embeddings again, the model needs the ids even when it starts late: `passing` then
        # replaces the stream that enters the first block.
        if residual is not None and self.attachment.layout.rereads_embeddings:
            if tokens is None:
                raise ValueError(f"{self.cfg.model_type} blocks reread the embeddings: start_at_layer needs tokens=")
            inputs = {"input_ids": tokens}
        # A memory stands for the tokens before these: its caches go in as a branch, and it stays as it is.
        if memory is not None:
            _require_unpadded(attention_mask)
            attention_mask = None
            read = cast(Tensor, tokens) if residual is None else residual[..., 0]
            hf_kwargs |= continuing(self.hf_model, memory.branch(self, read), memory.T, read)
        hf_kwargs.setdefault("use_cache", False)
        try:
            with self.attachment.passing(start, stop, residual):  # whole runs too: a hook of a partial run may make one
                logits = self.hf_model(**inputs, attention_mask=attention_mask, **hf_kwargs).logits
        except StopForward as stopped:
            return stopped.residual
        return self._returned_value(logits, tokens, attention_mask, return_type, loss_per_token)

    @torch.no_grad()
    def generate(
        self,
        input: str | list[str] | Tensor,
        max_new_tokens: int | None = None,
        *,
        edits: Edits = (),
        edit_rows: Sequence[EditRow] | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        stop_at_eos: bool = True,
        verbose: bool = False,
        memory: Memory | None = None,
        **hf_kwargs: object,
    ) -> Any:
        """Hugging Face's own ``generate``, with hooks and edits acting at every token, prompt and generated.

        Args:
            max_new_tokens: tokens that are generated; None: as the model's generation config has it.
            edits: one WriteEdit or several, which all act on every row. Positions count from the first prompt token,
                padding included (or from the first token of a cache or memory that is passed in).
            edit_rows: for each prompt its own edits (one, several, or ``[]``); not with beams or several returned
                sequences, which run more rows than prompts.
            return_type: "tokens" [B,T], "str", or "input" for the kind that was given.
            attention_mask: [B,T]; made by itself for text that needs padding.
            stop_at_eos: False: resume behind the end-of-sequence token.
            verbose: taken for TransformerLens' sake; there is no progress bar.
            memory: read on from here, as in `forward`; ``input`` and the result are what follows it. Beams and several
                returned sequences of a prompt begin with the same memory.
            hf_kwargs: ``do_sample``, ``temperature`` ...; with ``return_dict_in_generate`` the result is Hugging
                Face's own. ``use_past_kv_cache`` of TransformerLens is ``use_cache``.

        Raises:
            InputError: TransformerLens' ``freq_penalty``; says what to use.
            EditError: an edit does not fit the model, ``edit_rows`` not the batch, or an edit never acted (generation
                ended before its position).
        """
        hf_kwargs = generation_arguments(hf_kwargs)
        if max_new_tokens is not None:
            hf_kwargs["max_new_tokens"] = max_new_tokens
        batch = self._token_batch(input, prepend_bos, "left", attention_mask, memory)
        mask = torch.ones_like(batch.tokens) if batch.attention_mask is None else batch.attention_mask
        check_mask(mask, batch.tokens)
        if bool((mask[:, -1] == 0).any()):
            raise InputError("generate needs prompts padded on the left; attention_mask ends with padding in some row")
        if not stop_at_eos:
            hf_kwargs["eos_token_id"] = None
        if hf_kwargs.get("use_cache", True):
            hf_kwargs = self.attachment.new_cache() | hf_kwargs
        if memory is not None:
            config = hf_kwargs.get("generation_config") or self.hf_model.generation_config
            asked = [hf_kwargs.get(name) or getattr(config, name) for name in ("num_beams", "num_return_sequences")]
            copies = max([1, *(cast(int, count) for count in asked if count)])
            hf_kwargs[cache_argument(self.hf_model)] = memory.branch(self, batch.tokens, copies)
            _require_unpadded(mask)
            mask = F.pad(mask, (memory.T, 0), value=1)  # longer than the input: upstream takes that for what follows
        with self.edits(edits, edit_rows=edit_rows):
            out = self.hf_model.generate(batch.tokens, attention_mask=mask, **hf_kwargs)
        if not isinstance(out, Tensor):
            return out
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return out
        text = self.to_string(out)
        return text[0] if isinstance(input, str) else text

    def memory(
        self, input: str | list[str] | Tensor, prepend_bos: bool | None = None, memory: Memory | None = None
    ) -> Memory:
        """Everything that the model carries forward after ``input``, as a value: see ``hookpoints.Memory``.

        Args:
            input: text or token ids [B,T], without padding.
            memory: read ``input`` after this one; text is then given no first token (bos), unless asked for.

        Cost: one pass with a cache, without logits.

        Raises:
            InputError: padding, or a memory of another model or number of rows.
            UnsupportedModelError: attention does not hold all tokens.
        """
        batch = self._token_batch(input, prepend_bos, None, None, memory)
        _require_unpadded(batch.attention_mask)
        return read(self, batch.tokens, memory)

    def logits_after(self, memory: Memory, input: str | list[str] | Tensor, *, gradients: bool = False) -> Tensor:
        """Logits [B,T,vocab] of ``input`` [B,T], read after ``memory``.

        Args:
            gradients: make them differentiable, by states that were put into the memory (`Memory.with_states`), and by
                weights where the model is ``trainable``. The result then holds the graph of the pass.
        """
        with torch.set_grad_enabled(gradients):
            return self(input, memory=memory)

    def run_with_edits(self, tokens: str | Tensor, rows: EditRows, **kwargs: Any) -> EditedRun:
        """Many edits of one sequence as one batch: row n of the result is the run with ``rows[n]``.

        Args:
            tokens: text, or tokens [1,T].
            rows: for each row one WriteEdit or several. A WriteEdit alone is one row.
            kwargs: ``stop``, ``batch_size``, ``gradients``, ``apart`` of ``EditSession.run``.

        One row is one pass. Of several, blocks below the lowest edited layer and tokens before the first edited
        position run once. For several calls on one sequence keep the ``edit_session``. Logits have no gradient, unless
        ``gradients`` ask for it.
        """
        rows = as_rows(rows)
        if len(rows) == 1:
            return run_alone(self, self._text_tokens(tokens), rows[0], **kwargs)
        return self.edit_session(tokens).run(rows, **kwargs)

    def edit_session(self, tokens: str | Tensor) -> EditSession:
        """The plain pass over a text, or ``tokens`` [1,T], kept, from which edited runs branch off cheaply."""
        return EditSession(self, self._text_tokens(tokens))

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Cross entropy of the next tokens [B,T-1] under ``logits`` [B,T,vocab], its mean unless ``per_token``; padding
        does not count.

        Raises:
            InputError: a mean over no token at all.
        """
        from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

        if not per_token:
            check_loss(tokens, attention_mask)
        return lm_cross_entropy_loss(
            logits, tokens.to(logits.device), None if attention_mask is None else attention_mask != 0, per_token
        )

    def recurrence(self, input: str | Tensor, layer: int, *, gradients: bool = False, **kwargs: Any) -> Recurrence:
        """The canonical factors of a layer on ``input``: reads, writes, decay, erase.

        Args:
            gradients: make them differentiable, by weights where the model is ``trainable``, or by what a hook returns
                with a gradient; the result then holds the graph of the pass up to the layer.
            kwargs: for ``forward``.
        """
        stop = layer + 1 if self.attachment.layout.is_chain else None
        return super().recurrence(input, layer, gradients=gradients, return_type=None, stop_at_layer=stop, **kwargs)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """[...,D], the columns of ``W_U`` of a token (an id, or a string that is one token) or of ids [...].

        They are directions of what the final norm gives; ``cache.apply_ln_to_stack`` brings parts of the stream there.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        directions = self.W_U.T[tokens]
        if isinstance(tokens, Tensor) and tokens.shape == (1,):
            return directions.squeeze(0)
        return directions

    def require_weights(self) -> None:
        """Raise InputError where the model is on the device "meta" and can run nothing."""
        if self.cfg.device.type == "meta":
            raise InputError(
                f"model: expected one with weights, got {self.cfg.model_name} on the device 'meta', which has shapes "
                "alone: load it without device='meta'"
            )

    # -- helpers

    def _token_batch(
        self,
        input: object,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        mask: Tensor | None,
        memory: Memory | None,
    ) -> TokenBatch:
        """Checked tokens; text that is read after a memory begins with bos only where that is asked for."""
        self.require_weights()
        if isinstance(input, str) or (isinstance(input, list) and input and isinstance(input[0], str)):
            bos = prepend_bos if memory is None else bool(prepend_bos)
            batch = self.tokenize(cast("str | list[str]", input), bos, padding_side)
            check_tokens(batch.tokens, self.cfg)
            return batch if mask is None else TokenBatch(batch.tokens, mask)
        tokens = as_tokens(input)  # where they are: of ids on the host nobody waits for a GPU
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        check_tokens(tokens, self.cfg)
        return TokenBatch(tokens.to(self.cfg.device), mask)

    def _text_tokens(self, text: str | Tensor) -> Tensor:
        return self.to_tokens(text) if isinstance(text, str) else text

    def _layer_index(self, layer: int | None, default: int) -> int:
        if layer is None:
            return default
        index = layer + self.cfg.n_layers if layer < 0 else layer
        if not 0 <= index <= self.cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range for a model of {self.cfg.n_layers} layers")
        return index

    def _returned_value(
        self, logits: Tensor, tokens: Tensor | None, mask: Tensor | None, return_type: ReturnType, per_token: bool
    ) -> Any:
        if return_type is None or return_type == "logits":
            return logits if return_type else None
        if return_type not in ("loss", "both"):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}")
        if tokens is None:
            raise ValueError("a loss with start_at_layer needs tokens=")
        loss = self.loss_fn(logits, tokens, mask, per_token)
        return loss if return_type == "loss" else Output(logits, loss)


def _require_unpadded(mask: Tensor | None) -> None:
    """Raise InputError for padding, which a memory has no place for."""
    if mask is not None and bool((mask == 0).any()):
        raise InputError("a memory needs rows of one length, got padding: read the rows one by one")
