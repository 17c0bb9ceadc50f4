"""What a program does before torch is imported, which takes seconds: OpenMP's threads are made good neighbours, and
Ctrl-C is one line.

The threads share each product, and soon sleep while they wait for one another.

By default they spin through 300,000 tests first. Where another program keeps one core busy, all of them then wait for
the one that is not running, and training is many times slower. Imported before torch, which reads the settings once.
They change no result. What you set yourself stays.
"""

import os
import sys
import traceback

SPINS = "3000"  # alone up to 5 % slower than 300,000, beside a busy program 1.4 to 11 times as fast
DEFAULT_SPINS = "300000"  # libgomp's own

IS_OURS = not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
if IS_OURS:
    os.environ["GOMP_SPINCOUNT"] = SPINS


def end_imports_quietly(kind, error, trace):
    """For sys.excepthook: Ctrl-C while the program's own imports run ends it as later on, with one line."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    frames = [code for code in frames if not code.co_filename.startswith("<frozen")]  # of python -m, of importing
    if kind is KeyboardInterrupt and all(code.co_name == "<module>" for code in frames[:2]):
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_imports_quietly
