"""Kills a training with kill -9, again and again, and shows that it loses the work in flight and no more.

    python -m tests.system.kill_training --kills 20 --seed 0 [--config FILE]

On a Ray cluster of its own on this machine, one training runs undisturbed. The same one then runs until as
many processes were killed as asked: a worker, the driver, a node, or Ray Train's controller, or a worker is
stopped, in the middle of a step, while a checkpoint is written, or while it is copied to storage. After the
death of a driver the same command is given again; otherwise the run must recover by itself. Kind and moment
of a kill are drawn with the seed. All trainings must end with the same weights, metrics and checkpoints, bit
for bit.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from hashlib import sha256
from itertools import product
from pathlib import Path

from tests.support import ROOT
from tests.support.killed_training import DISTURBED, Nodes, kill_training, score_and_train

KINDS = "worker", "driver", "node", "controller", "stop"

MOMENTS = "step", "write", "copy"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=ROOT / "pipelines/configs/sandbox.yaml")
    arguments = parser.parse_args()
    plan = list(product(KINDS, MOMENTS)) * (arguments.kills // 15 + 1)
    random.Random(arguments.seed).shuffle(plan)
    steps = "train.save_steps=2", "train.max_steps=24", "train.stall_seconds=10"
    with tempfile.TemporaryDirectory(prefix="kill-training-") as name, Nodes(workers=2) as nodes:
        folder = Path(name)
        score_and_train(nodes, arguments.config, folder, [*steps, *DISTURBED])
        total = kill_training(nodes, arguments.config, folder, plan[: arguments.kills], arguments.seed, steps)
        digest = sha256((folder / "undisturbed/model/model.safetensors").read_bytes()).hexdigest()
    print(f"{total}\nSHA-256 of the weights, undisturbed and after every kill: {digest}")
    assert total.partial == 0


if __name__ == "__main__":
    main()
