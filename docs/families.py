"""Write docs/families.md: every family that is tested, and what the self-test of this machine finds. Takes a minute.

``python docs/families.py``; a test compares the table with the self-test, family by family.
"""

from pathlib import Path

import torch
import transformers

from corolla.blocks import FAMILIES, UNSUPPORTED, check_family
from corolla.blocks.zoo import default_config

HEAD = """\
# Families

<!-- Written by docs/families.py; change src/corolla/blocks/zoo.py, then run it again. -->

Model types of transformers whose blocks Corolla runs in spans, as found with VERSIONS.
A server tests the very configuration that it is about to serve, so a family that is not listed may work as well;
these are tested with every change.

* **exact**: three spans give bit for bit what the whole model gives: prompts, cached steps, padded batches, gradients.
* **packed**: tokens of many sessions run in one batch, and keys and values live in pages. Where not, each session of a
  server keeps the family's own cache, and runs alone.
* **lean**: the commonest kind of block, RMS norms, rotary attention and a gated MLP, has a decode step of its own with
  fewer operations and faster kernels, and on a CPU in machine code of its own
  ([performance.md](performance.md#where-a-decode-step-goes)).
* **rewind**: a session can be taken back to an earlier position. Where not, it is started anew from the log of what was
  sent.

| family | exact | packed | lean | rewind | why not |
|---|---|---|---|---|---|
"""

TAIL = """
These cannot be cut into spans, and a server refuses them:

| family | why |
|---|---|
"""

PLAIN_REASONS = {
    "a way of its own": "attention code of its own",
    "running state": "keeps a running state",
    "attention_mask": "makes masks of its own",
    "mask or a cache": "needs a mask or a cache of transformers' own",
    "rearranged": "rearranges keys after they were stored",
    "without storing": "attends twice to what it stores once",
}


def main() -> None:
    """Run the self-test on every family and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for family in FAMILIES:
        report = check_family(default_config(family))
        why = next((plain for words, plain in PLAIN_REASONS.items() if words in report.reason), report.reason)
        found = (report.is_supported, report.is_packable, report.is_lean, report.can_rewind)
        answers = ("yes" if answer else "no" for answer in found)
        rows.append(f"| `{family}` | {' | '.join(answers)} | {why} |\n")
    unsupported = [f"| `{family}` | {why} |\n" for family, why in UNSUPPORTED.items()]
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}"
    page = HEAD.replace("VERSIONS", versions) + "".join(rows) + TAIL + "".join(unsupported)
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
