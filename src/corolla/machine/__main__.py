"""``python -m corolla.machine DTYPE GROUP FORM THREADS`` writes to standard output what ``kernels.py`` loads."""

import json
import sys

from corolla.machine.kernels import make_code

if __name__ == "__main__":
    counts, code = make_code(*sys.argv[1:])
    sys.stdout.buffer.write(json.dumps(counts).encode() + b"\n" + code)
