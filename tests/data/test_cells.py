"""What a format takes of cells that are padded, repeated, or hold nothing."""

from __future__ import annotations

from math import nan

import pytest

from bdpo.data.formats import format_named

HEADER = "<|im_start|>user\nWhere do owls nest?<|im_end|>\n<|im_start|>assistant"


@pytest.mark.parametrize(
    ("prompt", "chosen", "kept"),
    [
        (HEADER, "\nIn hollows.<|im_end|>", "In hollows."),  # the newline is the header's
        (HEADER, "\n\nIn hollows.", "\nIn hollows."),
        (HEADER, "In hollows.", "In hollows."),
        (HEADER + "\n", "\nIn hollows.", "\nIn hollows."),
        (HEADER + "\n", "In hollows. \n", "In hollows. \n"),
        (HEADER + "\n", "In hollows. <|im_end|>\n", "In hollows. "),
    ],
)
def test_no_space_of_a_chatml_answer_is_lost_or_won(prompt, chosen, kept):
    pair = format_named("chatml").read({"prompt": prompt, "chosen": chosen, "rejected": "\nNo.<|im_end|>"})
    assert pair.chosen["content"] == kept


@pytest.mark.parametrize("second", ["question", "input"])
def test_columns_of_an_instruction_that_say_the_same_are_written_once(second):
    row = {"instruction": "Name an owl.", second: "Name an owl.", "chosen": "Barn owl.", "rejected": "Crow."}
    assert format_named("instruction").read(row).prompt == [{"role": "user", "content": "Name an owl."}]


@pytest.mark.parametrize("nothing", [None, nan])
@pytest.mark.parametrize("lacks", ["rating", "text"])
@pytest.mark.parametrize("form", ["answers", "completions", "generations"])
def test_a_ranked_answer_without_rating_or_text_is_skipped(form, lacks, nothing):
    ratings: list[float | None] = [3.0, 9.0, 1.0]
    texts: list[str | float | None] = ["Barn owl.", "Eagle owl.", "Crow."]
    if lacks == "rating":
        ratings[1] = nothing
    else:
        texts[1] = nothing
    row = {
        "answers": {
            "answers": [
                {"answer": text, "rank": rating and 10 - rating}
                for text, rating in zip(texts, ratings, strict=True)
            ]
        },
        "completions": {
            "completions": [
                {"response": text, "overall_score": rating}
                for text, rating in zip(texts, ratings, strict=True)
            ]
        },
        "generations": {"generations": texts, "ratings": ratings},
    }[form]
    pair = format_named("ranked").read({"prompt": "Name an owl."} | row)
    assert (pair.chosen["content"], pair.rejected["content"]) == ("Barn owl.", "Crow.")


def test_the_loss_weight_of_a_message_is_named_as_not_read():
    def conversation(text):
        turns = [("user", "Name an owl."), ("assistant", text)]
        return [{"role": role, "content": content, "loss_weight": 1.0} for role, content in turns]

    row = {"chosen_messages": conversation("Barn owl."), "rejected_messages": conversation("Crow.")}
    pair = format_named("llama_factory_v1").read(row)
    assert pair.unread == {"chosen_messages[].loss_weight", "rejected_messages[].loss_weight"}
    assert pair.chosen == {"role": "assistant", "content": "Barn owl."}
