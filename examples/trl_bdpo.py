"""Balanced DPO inside TRL 1.16: `DPOTrainer` with the loss and the weights of this project.

    pip install "bdpo[lora]" trl==1.16.0
    python examples/trl_bdpo.py --model Qwen/Qwen2-0.5B-Instruct --data pairs.jsonl --out trained

The reference is asked once, by `bdpo.score_pairs`; its log-probs, its mutual information and the token ids
that they are of become columns of the data set. There is no reference model in memory during training.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import bdpo

MI = ("mi_chosen", "mi_rejected")


class BdpoCollator(DataCollatorForPreference):
    """TRL's collator, which keeps the mutual information of the pairs: two more tensors, shape (pairs,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, the chosen responses before the rejected ones."""
        mi = {name: torch.tensor([example[name] for example in examples]) for name in MI}
        return super().torch_call(examples) | mi


class BdpoTrainer(DPOTrainer):
    """A DPOTrainer whose data set is `Dataset.from_dict(bdpo.score_pairs(...).columns())`."""

    def __init__(self, model: Any, args: DPOConfig, *, alpha: float = 1.0, **settings: Any) -> None:
        args.precompute_ref_log_probs = True  # so that TRL loads no reference model
        collator = BdpoCollator(settings["processing_class"].pad_token_id, args.max_length)
        super().__init__(model, args=args, data_collator=collator, **settings)
        self.alpha = alpha

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # has token ids: those that were scored

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # has the log-probs of the reference

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *MI])]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The mean loss of a batch, scalar; `args.beta` is β. Equation: arXiv 2603.22829."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**rows, labels=labels, use_cache=False, fused_lm_head=True)
        policy = outputs.log_probs.sum(1).chunk(2)  # nats, (chosen, rejected)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        mi = (inputs[name] for name in MI)
        loss = bdpo.bdpo_loss(*policy, *reference, *mi, alpha=self.alpha, beta=self.beta).mean()
        return (loss, outputs) if return_outputs else loss


def main(arguments: list[str] | None = None) -> None:
    """Score, then train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a chat model, of the hub or a folder")
    parser.add_argument("--data", required=True, help="JSON Lines of preference pairs")
    parser.add_argument("--out", required=True, help="folder of the trained model")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and response")
    parser.add_argument("--steps", type=int, default=-1, help="training steps; by default one epoch")
    given = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = load_dataset("json", data_files=given.data, split="train").to_list()
    lengths = {"max_length": given.max_length, "max_prompt_length": given.max_length // 2}
    data = Dataset.from_dict(bdpo.score_pairs(model, tokenizer, rows, **lengths).columns())
    tokenizer.pad_token = tokenizer.eos_token  # masked; a padding token may lie beyond the embedding
    settings = DPOConfig(
        given.out, beta=0.1, learning_rate=1e-6, num_train_epochs=1, max_steps=given.steps,
        max_length=given.max_length, bf16=torch.cuda.is_available(), report_to=[],
    )  # fmt: skip
    trainer = BdpoTrainer(model, settings, alpha=1.5, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
