"""The architectures that the training script knows. A further one is a module like these and an entry here."""

from embedded_family import Family
from embedded_gdn import GDN
from embedded_mamba2 import MAMBA2
from embedded_rwkv7 import RWKV7

FAMILIES: dict[str, Family] = {"gdn": GDN, "mamba2": MAMBA2, "rwkv7": RWKV7}
