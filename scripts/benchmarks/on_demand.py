"""Train with the flags given, but only once a line arrives on standard input: all imports are then done.

So the trainings of a benchmark can load their libraries, which takes longer than a short training, all at once, and
then be measured one after another.
"""

from __future__ import annotations

import sys
from importlib import import_module

READY = "ready to train"
"""The line that says that only the word is missing."""


def main() -> None:
    """Load everything, wait for the line, and hand over to the training command."""
    from megacontext_megatron.evaluate import launch_alone
    from megacontext_megatron.pretrain import main as train
    from megacontext_megatron.pretrain import prepare

    launch_alone()
    words = sys.argv[1:]
    prepare(words)
    for module in ("megatron.training", "megacontext_megatron.run"):
        import_module(module)
    print(READY, flush=True)
    # an ended pipe is a parent that gave up
    if sys.stdin.readline():
        train(words)


if __name__ == "__main__":
    main()
