"""How the threads of torch wait for each other on a CPU, settled before torch loads.

OpenMP's threads spin at the end of each operation until the last one arrives. Where another process holds a core, they
spin through its time slice. Training steps and short forward passes on two busy cores took 9 to 30 times as long as on
one thread, with a short spin (``GOMP_SPINCOUNT=10000``) 3 to 4 times, and asleep 0.8 to 1.9 times; `benchmarks/busy.py`
measures this. The console script runs this file by its path, so it imports nothing of the package.
"""

import os
import sys

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
