"""Flip random bytes in the files of a run folder, and count what the readers of the files make of it.

    python -m tests.system.flip_bytes [RUN_DIR] [--flips 10000] [--seed 0]

Without RUN_DIR a small run folder is made. `tests.support.flipped_bytes` says what is counted. Exit code 1 if
a flip was taken silently or ended in a traceback.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bdpo.storage.run_dir import RunDir
from tests.support.flipped_bytes import FAULTS, flip, small_run


def main() -> int:
    """Print the counts; 1 if a flip was taken silently or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(arguments.run_dir) if arguments.run_dir else small_run(Path(folder) / "run")
        counts = flip(run, arguments.flips, arguments.seed)
    for (kind, what), number in sorted(counts.items()):
        print(f"{kind:24} {what:10} {number:6}")
    total = Counter(dict.fromkeys(FAULTS, 0))
    for (_, what), number in counts.items():
        total[what] += number
    print(", ".join(f"{what}: {number}" for what, number in sorted(total.items())))
    return int(any(total[what] for what in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
