"""What an answer's text shows without a judge: where its thoughts end, and whether it is broken."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Literal

THOUGHTS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
"""Marks around a thought block, by the chat templates of the families that write one."""

Defect = Literal["empty", "repetition", "other_script", "gibberish"]

_UNSPACED = ("CJK", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that do not separate words by spaces."""

_WORD = re.compile(r"\w+")

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can for from have how i if in is it my not of on or so that the there "
        "this to was what will with you your",
    )
)
"""These words are 30 to 50 % of the words of English text."""


def opened_thought(generation_prompt: str) -> str:
    """The mark with which a prompt's last tokens open a thought block; empty where they open none.

    Some templates (DeepSeek-R1) write it themselves, and the answer then begins inside of the block.
    """
    end = generation_prompt.rstrip()
    return next((opening for opening, _ in THOUGHTS if end.endswith(opening)), "")


def without_thoughts(response: str) -> str | None:
    """The answer behind the thought blocks; None where a block never ends, so that there is no answer."""
    for opening, closing in THOUGHTS:
        _, closed, answer = response.rpartition(closing)
        if opening in (answer if closed else response):
            return None
        if closed:
            return answer.strip()
    return response


def defect_of(response: str, prompt: str) -> Defect | None:
    """Why a response is no text that a working model writes; None where nothing is wrong with it.

    - `empty`: no letter and no digit.
    - `repetition`: of 50 words or more, under 30 % of the sequences of four are different ones (after the
      rules for repetition of Rae et al., arXiv 2112.11446, table A1).
    - `other_script`: most letters are of another script than most letters of the prompt.
    - `gibberish`: letters of three scripts or more, each above 5 %; or words of more than 20 characters on
      average; or fewer than 40 % letters and digits; or more than 2 % control and replacement characters; or,
      where the prompt is English, of 10 words or more under 12 % function words (after the stop word rule of
      the same table).

    Rules of thumb, without a model: a fluent answer that makes no sense is not found, and an answer that was
    asked to be in another script or language counts as one.
    """
    words = _WORD.findall(response)
    if not words:
        return "empty"
    scripts = _scripts(response)
    unspaced = _main(scripts) in _UNSPACED
    if _repeats(list("".join(words)) if unspaced else words):
        return "repetition"
    if _is_gibberish(response, scripts, [] if unspaced else words) or _is_no_english(response, prompt):
        return "gibberish"
    asked = _main(_scripts(prompt))
    return "other_script" if asked and _main(scripts) not in (asked, "") else None


def _repeats(parts: list[str]) -> bool:
    if len(parts) < 50:
        return False
    sequences = [tuple(parts[i : i + 4]) for i in range(len(parts) - 3)]
    return len(set(sequences)) < 0.3 * len(sequences)


def _is_gibberish(text: str, scripts: Counter[str], words: list[str]) -> bool:
    if sum(count > 0.05 * scripts.total() for count in scripts.values()) >= 3:
        return True
    if sum(map(len, words)) > 20 * len(words):
        return True
    visible = [character for character in text if not character.isspace()]
    unprintable = sum(unicodedata.category(c) == "Cc" or c == "\N{REPLACEMENT CHARACTER}" for c in visible)
    if unprintable > 0.02 * len(visible):
        return True
    return sum(unicodedata.category(character)[0] in "LNM" for character in visible) < 0.4 * len(visible)


def _is_no_english(response: str, prompt: str) -> bool:
    """Whether an English prompt was answered, outside of code and lists, without English sentences.

    The items of a list, on lines of their own or between commas, have few function words.
    """
    parts = [_WORD.findall(part) for part in re.split(r"[\n,;]", _CODE.sub(" ", response))]
    words = [word for part in parts if len(part) > 4 for word in part if word.isalpha()]
    if len(words) < 10 or not _FUNCTION_WORDS.intersection(_WORD.findall(prompt.lower())):
        return False
    return sum(word.lower() in _FUNCTION_WORDS for word in words) < 0.12 * len(words)


def _main(scripts: Counter[str]) -> str:
    """The script of most letters; empty without letters."""
    return scripts.most_common(1)[0][0] if scripts else ""


def _scripts(text: str) -> Counter[str]:
    """Letters by script, the first word of a letter's Unicode name; Japanese counts as one."""
    letters = (character for character in text if character.isalpha())
    names = (unicodedata.name(letter, "?").split(maxsplit=1)[0] for letter in letters)
    japanese = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
    return Counter(japanese.get(name, name) for name in names)
