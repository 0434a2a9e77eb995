"""The two checks that every entry point shares."""

import torch
from torch import Tensor


def require(condition: bool, field: str, found: object, wanted: str) -> None:
    """Refuse a config value, naming the field, what was found and what is needed."""
    if not condition:
        raise ValueError(f"{field}={found!r}: must be {wanted}.")


def check_finite(result: Tensor, *inputs: Tensor) -> None:
    """Refuse NaN and infinity in a linear map's result, where they end up whichever input held them.

    One sum over `result` when all is well; nothing on the meta device and in compiled graphs.

    Raises:
        ValueError: names the input that is not finite and its first bad row, or blames the weights.
    """
    if torch.compiler.is_compiling() or result.is_meta:
        return
    if torch.isfinite(result.detach().sum(dtype=torch.promote_types(result.dtype, torch.float32))):
        return
    for x in inputs:
        rows = torch.nonzero(~torch.isfinite(x.detach()).reshape(-1, x.shape[-1]).all(-1)).flatten()
        if len(rows):
            raise ValueError(
                f"Input of shape {list(x.shape)} has NaN or infinite values in {len(rows)} rows, the first being row "
                f"{int(rows[0])}. Check the model's dtype (fp16 overflows easily) and leave those positions out."
            )
    if torch.isfinite(result).all():  # only the sum overflowed
        return
    raise ValueError(
        f"The input is finite but the pre-activations of shape {list(result.shape)} are not: the weights hold NaN or "
        "infinite values, or have grown beyond the dtype. Lower the learning rate or load an earlier checkpoint."
    )
