"""``python -m corolla.machine DTYPE GROUP FORM THREADS`` writes to standard output what ``kernels.py`` loads."""

import json
import sys

from corolla.machine.kernels import make_code

if __name__ == "__main__":
    dtype, group, form, threads = sys.argv[1:]
    counts, code = make_code(dtype, group, form, int(threads))  # type: ignore[arg-type]  # it is kernels.py that calls
    sys.stdout.buffer.write(json.dumps(counts).encode() + b"\n" + code)
