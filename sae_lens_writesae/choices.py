"""What a dictionary is trained on and for, and how it is built, in words that settings take."""

from typing import Literal, TypedDict

Target = Literal["write", "state", "last_state"]
"""`write`: the matrix that is added at each token, which the substitution test exchanges (the default). `state`: the
state after each token (the paper's text). `last_state`: the state at the end of each sequence (the paper's code)."""

Loss = Literal["mse", "reads", "write"]
"""`mse`: the matrix itself. `reads`: what the head's queries read from it. `write`: the matrix itself, and atoms along
the write of the same token."""

MetricName = Literal["frobenius", "gauss_newton"]
"""`frobenius`: an error costs the sum of its squares. `gauss_newton`: the KL divergence that it causes in the model."""

Encoder = Literal["bilinear", "tied", "dense"]
Decoder = Literal["rank", "flat"]


class Variant(TypedDict):
    """Config fields that make a variant of the paper."""

    encoder: Encoder
    decoder: Decoder
    rank: int


VARIANTS: dict[str, Variant] = {
    "WriteSAE": {"encoder": "bilinear", "decoder": "rank", "rank": 1},
    "TiedSAE": {"encoder": "tied", "decoder": "rank", "rank": 1},
    "MatrixSAE": {"encoder": "dense", "decoder": "rank", "rank": 1},
    "BilinearFlatSAE": {"encoder": "bilinear", "decoder": "flat", "rank": 1},
    "FlatSAE": {"encoder": "dense", "decoder": "flat", "rank": 1},
    "WriteSAE-rank2": {"encoder": "bilinear", "decoder": "rank", "rank": 2},
    "WriteSAE-rank4": {"encoder": "bilinear", "decoder": "rank", "rank": 4},
}
"""The paper's variants, for any architecture. The paper's BilinearSAE ("untied") is the WriteSAE."""
