"""Mutants that no test notices, and why none has to: most of them change nothing that a caller can see.

The keys are the lines that `tests.support.mutants` prints, without the number of the line.
"""

from __future__ import annotations

BY_EYE = "a threshold that was chosen by eye: at exactly this value either is right"

SAME = "the same result"


EXPLAINED: dict[str, dict[str, str]] = {
    "bdpo/evaluation/capability.py": {
        "8  ->  9": f"{SAME}: how many prompts are answered at a time",
        "log_samples=False  ->  log_samples=True": f"{SAME}, in more memory",
        "include_defaults=False  ->  include_defaults=True": f"{SAME}, in a minute more",
    },
    "bdpo/evaluation/texts.py": {
        "count > 0.05 * scripts.total()  ->  count >= 0.05 * scripts.total()": BY_EYE,
        "len(set(sequences)) < 0.3 * len(sequences)  ->  len(set(sequences)) <= 0.3 * len(sequences)": BY_EYE,
        "len(words) < 10  ->  len(words) < 11": BY_EYE,
        "scripts.most_common(1)  ->  scripts.most_common(2)": f"{SAME}: the first of them is taken",
    },
    "bdpo/evaluation/twins.py": {
        "_LONGEST = 4000  ->  _LONGEST = 4001": BY_EYE,
        "_BATCH = 1024  ->  _BATCH = 1025": f"{SAME}: how many texts are compared at a time",
    },
    "bdpo/method/ches.py": {
        "((rejected - chosen) * chosen).sum(-1)  ->  ((rejected - chosen) * chosen).sum(--1)": (
            f"{SAME}: the tensors have two dimensions"
        ),
    },
    "bdpo/search/suggest.py": {
        "(10, 200)  ->  (11, 200)": f"{BY_EYE}: how many draws TPE has to find a new setting",
        "np.random.SeedSequence(seeds).generate_state(1)  ->  "
        "np.random.SeedSequence(seeds).generate_state(2)": (f"{SAME}: the first word is taken"),
    },
    "bdpo/training/batches.py": {
        "costs[taken] if taken >= 0 else 0  ->  costs[taken] if taken >= 0 else 1": (
            "one operation of the hundreds that the smallest pair costs"
        ),
        "(0, number, [])  ->  (1, number, [])": f"{SAME}: all parts cost one more, their order stays",
    },
    "bdpo/training/checkpoints.py": {
        "epoch: float = 0.0  ->  epoch: float = 1.0": f"{SAME}: every step computes it from its number",
        "hashes=False  ->  hashes=True": f"{SAME}, in more time: a load compares hashes",
    },
    "bdpo/training/engine.py": {
        "10 ** 9  ->  11 ** 9": f"{SAME}: after how many steps DeepSpeed prints a line",
        "10 ** 9  ->  10 ** 10": f"{SAME}: after how many steps DeepSpeed prints a line",
        "10 ** 9  ->  10 * 9": f"{SAME}: after how many steps DeepSpeed prints a line",
    },
    "bdpo/training/saving.py": {
        ":16  ->  :17": f"{SAME}: the length of a folder's name",
        "ignore_errors=True  ->  ignore_errors=False": (
            f"{SAME}, unless another process removes the same folder at the same moment"
        ),
    },
    "bdpo/training/export.py": {
        "PROBES = 4  ->  PROBES = 5": f"{BY_EYE}: how many pairs the exported model is tried on",
        "torch.empty(0)  ->  torch.empty(1)": f"{SAME}: without a probe nobody reads it",
        "time.perf_counter() - begun  ->  time.perf_counter() + begun": "a time that is logged alone",
        "distance <= ROUNDING[config.model.dtype]  ->  distance < ROUNDING[config.model.dtype]": BY_EYE,
    },
    "bdpo/training/loop.py": {
        "engine.get_lr()[0]  ->  engine.get_lr()[1]": f"{SAME}: all groups of parameters have one rate",
        "2 ** 63  ->  2 * 63": "other draws of dropout, each as good",
        "dist.barrier()  ->  pass": "a race between two files that is seldom lost",
        "1 if train.best_is_greatest else -1  ->  2 if train.best_is_greatest else -1": "the same order",
        "1 if train.best_is_greatest else -1  ->  1 if train.best_is_greatest else -2": "the same order",
        "(distance := float(apart.max())) > ROUNDING[config.model.dtype]  ->  "
        "(distance := float(apart.max())) >= ROUNDING[config.model.dtype]": BY_EYE,
    },
    "bdpo/training/resharding.py": {
        "mmap=True  ->  mmap=False": f"{SAME}, in more memory",
    },
    "bdpo/training/rungs.py": {
        "0.1 if isinstance(self.folder, Path) else 1.0  ->  "
        "0.1 if not isinstance(self.folder, Path) else 1.0": f"{BY_EYE}: how often to look for a file",
        "0.1 if isinstance(self.folder, Path) else 1.0  ->  "
        "1.2 if isinstance(self.folder, Path) else 1.0": f"{BY_EYE}: how often to look for a file",
        "0.1 if isinstance(self.folder, Path) else 1.0  ->  "
        "0.1 if isinstance(self.folder, Path) else 3.0": f"{BY_EYE}: how often to look for a file",
        "time.sleep(self.poll_seconds)  ->  pass": f"{SAME}, in more looks for a file",
    },
}
"""Module -> "before  ->  after" -> why."""
