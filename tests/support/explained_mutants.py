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
        "np.intersect1d(first, second, assume_unique=True)  ->  "
        "np.intersect1d(first, second, assume_unique=False)": f"{SAME}, in more time",
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
        "max(loads) > CLOSE_TO_MEAN * sum(loads) / len(loads)  ->  "
        "max(loads) >= CLOSE_TO_MEAN * sum(loads) / len(loads)": BY_EYE,
        "loads[other] + moved  ->  loads[other] - moved": (
            "another exchange than the best is made first; the end is as balanced, which is tested"
        ),
        "[*parts[other], -1]  ->  [*parts[other], -2]": f"{SAME}: any number below 0 stands for none",
        "costs[taken] if taken >= 0 else 0  ->  costs[taken] if taken >= 0 else 1": (
            "one operation of the hundreds that the smallest pair costs"
        ),
        "(0, number, [])  ->  (1, number, [])": f"{SAME}: all parts cost one more, their order stays",
    },
}
"""Module -> "before  ->  after" -> why."""
