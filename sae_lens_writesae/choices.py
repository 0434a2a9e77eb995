"""What a dictionary is trained on and for, in words that settings and flags take. Without torch, for help's sake."""

from typing import Literal

Target = Literal["write", "state", "last_state"]
"""`write`: the matrix that is added at each token, which the substitution test exchanges (the default). `state`: the
state after each token (the paper's text). `last_state`: the state at the end of each sequence (the paper's code)."""

Loss = Literal["mse", "reads", "write"]
"""`mse`: the matrix itself. `reads`: what the head's queries read from it. `write`: the matrix itself, and atoms along
the write of the same token."""
