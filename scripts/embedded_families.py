"""The architectures that the training script knows. A further one is a module like these two and an entry here."""

from embedded_family import Family
from embedded_gdn import GDN
from embedded_mamba2 import MAMBA2

FAMILIES: dict[str, Family] = {"gdn": GDN, "mamba2": MAMBA2}
