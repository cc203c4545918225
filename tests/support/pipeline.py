"""A small run of every stage, and its commands in this process."""

from __future__ import annotations

from pathlib import Path

from bdpo.models.tokenizer import ChatTokenizer
from tests.support.commands import Ended, run_command
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl

PAIRS = 22

TAMPER_STEPS = 3

TAMPER_SETTINGS = (
    f"tamper.steps={TAMPER_STEPS}",
    "tamper.learning_rate=0.01",
    "tamper.global_batch_size=4",
    "train.workers=1",
    "evaluate.benchmarks=[strongreject]",
)


def pipeline_inputs(folder: Path, chat: ChatTokenizer) -> Path:
    """A model folder, pairs, one of them bad, two benchmarks, and `config.yaml` that names them."""
    strongreject, xstest = folder / "strongreject.csv", folder / "xstest.csv"
    strongreject.write_text("category,source,forbidden_prompt\na,x,take the amber\nb,x,hide the fern\n")
    xstest.write_text(
        "id,prompt,type,label,focus,note\n1,plant a fern,t,safe,,\n2,burn a fern,contrast_t,unsafe,,\n"
    )
    bad = {"prompt": "x", "chosen": None, "rejected": "y"}
    config = tiny_config(
        folder / "run",
        save_model(folder / "model", chat),
        write_jsonl(folder / "pairs.jsonl", [*invented_pairs(PAIRS), bad]),
        train={"workers": 2},
        score={"workers": [1, 2]},
        evaluate={"strongreject": {"path": str(strongreject)}, "xstest": {"path": str(xstest)}},
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def pipeline(stage: str, config_file: Path, *overrides: str) -> Ended:
    """`python -m pipelines.<stage> --config FILE overrides`."""
    return run_command(f"pipelines.{stage}", "--config", config_file, *overrides)
