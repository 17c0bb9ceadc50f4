"""OpenMP's threads, which share each product, soon sleep while they wait for one another.

By default they spin through 300,000 tests first. Where another program keeps one core busy, all of them then wait for
the one that is not running, and training is many times slower. Imported before torch, which reads the settings once.
They change no result. What you set yourself stays.
"""

import os

SPINS = "3000"  # alone up to 5 % slower than 300,000, beside a busy program 1.4 to 11 times as fast
DEFAULT_SPINS = "300000"  # libgomp's own

IS_OURS = not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
if IS_OURS:
    os.environ["GOMP_SPINCOUNT"] = SPINS
