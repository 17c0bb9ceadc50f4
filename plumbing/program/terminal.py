"""Printing never ends a program: letters that the terminal lacks are spelled out, and a reader that has gone, such as
`head -1`, does not stop the work."""

import contextlib
import errno
import io
import os
import signal
import sys


class Pipe(io.FileIO):
    """Drops what comes after its reader has gone, or its disk is full."""

    error = None

    def write(self, data):
        if not self.error:
            try:
                return os.write(self.fileno(), data)
            except OSError as e:
                self.error = e
        return len(data)


@contextlib.contextmanager
def forgiving_output():
    """Around a whole program: it prints as above, and Ctrl-C ends it without a traceback. The exit codes are those
    that a shell expects: 128 + the signal's number, 141 where the output's reader has gone."""
    before = sys.stdout, sys.stderr
    # A stream that the shell has closed (2>&-) is None here.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    pipe = None
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, which shows all and never goes
        sys.stdout.reconfigure(errors="backslashreplace")
        if not sys.stdout.isatty():
            stdout = sys.stdout
            pipe = Pipe(stdout.fileno(), "w", closefd=False)
            options = {"errors": "backslashreplace", "line_buffering": stdout.line_buffering or stdout.write_through}
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(pipe), stdout.encoding, **options)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
    if pipe and pipe.error:
        if pipe.error.errno in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL
            sys.exit(128 + 13)  # SIGPIPE, which Windows does not have
        print(f"error: standard output: {pipe.error.strerror}; what was printed after that is lost", file=sys.stderr)
        sys.exit(2)


def reader_has_gone() -> bool:
    """Whether nobody reads any more what this program prints. Then what only prints need not go on."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return getattr(raw, "error", None) is not None
