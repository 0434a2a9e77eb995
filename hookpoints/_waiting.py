"""How the threads of torch wait for each other on a CPU, settled before torch loads.

OpenMP's threads spin at the end of each operation until the last one arrives. Where another process holds a core, they
spin through its time slice, and short operations take many times as long as on one thread. Threads that sleep do not.
"""

import os
import sys

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
