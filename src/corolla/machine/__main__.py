"""``python -m corolla.machine DTYPE GROUP FORM`` writes, to its standard output, what ``machine/kernels.py`` loads."""

import json
import sys

from corolla.machine.kernels import make_code

if __name__ == "__main__":
    counts, code = make_code(*sys.argv[1:])  # type: ignore[arg-type]  # it is kernels.py that calls
    sys.stdout.buffer.write(json.dumps(counts).encode() + b"\n" + code)
