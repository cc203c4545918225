"""A small random model and tokenizer for your own text: try the pipeline on it without a hub.

    python -m pipelines.tiny_model --data FILE --out FOLDER [--vocab-size 4096]

Trains a byte-level BPE tokenizer on the texts of a preference data set (any format that the pipeline
reads), gives it a ChatML template, and writes it beside a Qwen2 of two layers with random weights. It
knows nothing: what it shows is that your data, lengths and config go through every stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from bdpo.config import DataConfig
from bdpo.data.formats.base import BadRow, Excluded
from bdpo.data.prepare import usable_pair
from bdpo.data.sources import open_source
from bdpo.sandbox.tiny import quiet_saving, train_tokenizer
from pipelines.runtime.cli import exit_codes

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(data: DataConfig) -> Iterator[str]:
    """Every prompt and response of the rows that can be read."""
    for config in data.sources():
        source = open_source(config)
        for _, row in source.rows:
            try:
                pair = usable_pair(source.format, row, config)
            except (BadRow, Excluded):
                continue
            yield from (message["content"] for message in (*pair.prompt, pair.chosen, pair.rejected))


def write_tiny_model(data: DataConfig, folder: Path, vocab_size: int) -> None:
    """Write tokenizer, chat template and random weights as `from_pretrained` loads them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(
        texts(data),
        vocab_size,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet_saving():
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="preference data in any known format")
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    with exit_codes():
        write_tiny_model(DataConfig(path=arguments.data), arguments.out, arguments.vocab_size)
    print(f"{arguments.out}: use it with model.name_or_path={arguments.out}")


if __name__ == "__main__":
    main()
