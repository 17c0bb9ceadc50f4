"""Set before torch is imported, which takes seconds: how OpenMP's threads wait, and what Ctrl-C does meanwhile.

The threads, which share each product, soon sleep while they wait for one another. By default they spin through
300,000 tests first: where another program keeps one core busy, all of them wait for the one that is not running, and
training is many times slower. torch reads the settings once. They change no result. What you set yourself stays.
"""

import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
SPINS = "3000"  # alone up to 5 % slower than 300,000, beside a busy program 1.4 to 11 times as fast
DEFAULT_SPINS = "300000"  # libgomp's own

IS_OURS = not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
if IS_OURS:
    os.environ["GOMP_SPINCOUNT"] = SPINS


def stop_while_importing(number, frame):
    """For SIGINT: an import that C++ code began would end in an abort, so the program ends here, without cleaning up.
    Nothing is begun yet."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame:
        end_quietly(KeyboardInterrupt, None, None)
    raise KeyboardInterrupt


def end_quietly(kind, error, trace):
    """For sys.excepthook: Ctrl-C is one line, as it is later on."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    os.write(2, b"stopped\n")
    os._exit(130)


program = getattr(sys.modules["__main__"], "__file__", None) or ""
is_our_program = os.path.realpath(program).startswith(ROOT + os.sep)
if is_our_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    sys.excepthook = end_quietly
    signal.signal(signal.SIGINT, stop_while_importing)
