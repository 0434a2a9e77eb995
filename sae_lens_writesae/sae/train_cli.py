"""SAELens' command line over our architectures and recurrent models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens.llm_sae_training_runner import _parse_cfg_args

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.sae.runner import MODEL_CLASS_NAME, text_dataset, train

_GUIDE = """\
Trains an SAE with SAELens' own command line. Every flag below is SAELens'; those of the chosen --architecture follow.

A run on a head of the model that ships with the package (K = 64, V = 32, so d_in = 2048):

  writesae train --architecture writesae_batchtopk --model_class_name HookedRecurrent --model_name embedded \\
      --dataset_path embedded --is_dataset_tokenized false --streaming false --prepend_bos false \\
      --hook_name blocks.2.mixer.heads.1.hook_write_vec --d_in 2048 --d_k 64 --d_v 32 --d_sae 512 --k 32 \\
      --training_tokens 200000 --train_batch_size_tokens 512 --n_batches_in_buffer 8 \\
      --log_to_wandb false --checkpoint_path writesae-out/checkpoints --output_path writesae-out/sae

hook_write_vec trains on writes, hook_state_vec on states; --dataset_path embedded is the package's held-out text.
An interrupted run leaves a whole checkpoint in --checkpoint_path; --resume_from_checkpoint goes on from it.
"""


def train_from_arguments(arguments: Sequence[str]) -> Any:
    """Parse SAELens' flags and train. Without arguments, or with --help, prints a guide and the flags."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(_GUIDE)
    cfg = _parse_cfg_args(list(arguments))
    dataset = text_dataset(embedded.text("train")) if cfg.dataset_path == "embedded" else None
    model = None
    if cfg.model_class_name == MODEL_CLASS_NAME:
        # Loaded here, so that a wrong hook or size is said before SAELens fills a buffer.
        kwargs = cfg.model_from_pretrained_kwargs
        model = HookedRecurrent.from_pretrained(cfg.model_name, device=cfg.llm_device, **(kwargs or {}))
    return train(cfg, model, dataset)
