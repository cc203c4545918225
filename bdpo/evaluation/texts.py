"""What an answer's text shows without a judge: whether it is broken."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Literal

Defect = Literal["empty", "repetition", "other_script", "other_language", "gibberish"]

_UNSPACED = ("CJK", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that do not separate words by spaces."""

_WORD = re.compile(r"\w+")

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

_LANGUAGES = {
    "English": "a an and are as at be but by can for from have how i if in is it my not of on or so that the "
    "there this to was what will with you your",
    "French": "le la les un une des du et est en que qui dans pour pas sur avec il elle je vous nous ce "
    "cette ne se au aux plus par sont ou mais votre vos comment faire",
    "German": "der die das ein eine einen und ist in den dem zu von mit nicht auf für es ich sie wir sich "
    "auch des als an wie werden kann oder aber sind durch man dann",
    "Spanish": "el la los las un una de y es en que por para no con se del al lo como más pero su sus este "
    "esta son cómo puede hacer o si",
    "Italian": "il lo la i gli le un una di e è in che per non con si del della al come più ma sono questo "
    "questa nel può fare o se dei",
    "Portuguese": "o a os as um uma de e é em que por para não com se do da dos das no na como mais mas seu "
    "sua são pode fazer ou este esta",
    "Dutch": "de het een en is in van te dat die voor niet op met zijn er aan je ik om ook als maar bij of "
    "uit door naar kan hoe worden",
}
"""Frequent words of languages that one script writes, by which their texts are told apart. Those of English
are 30 to 50 % of its words."""

_FREQUENT = {name: frozenset(words.split()) for name, words in _LANGUAGES.items()}


def defect_of(response: str, prompt: str) -> Defect | None:
    """Why a response is no text that a working model writes; None where nothing is wrong with it.

    - `empty`: no letter and no digit.
    - `repetition`: of 12 words or more, or of the last 50, under 30 % of the sequences of four are different
      ones (after the rules for repetition of Rae et al., arXiv 2112.11446, table A1).
    - `other_script`: most letters are of another script than most letters of the prompt.
    - `other_language`: by their most frequent words both are of different languages, of seven European ones.
    - `gibberish`: letters of three scripts or more, each above 5 %; or words of more than 20 characters on
      average; or fewer than 40 % letters and digits; or more than 2 % control and replacement characters; or,
      where the prompt is English, of 10 words or more under 12 % function words (after the stop word rule of
      the same table).

    Rules of thumb, without a model: a fluent answer that makes no sense is not found, nor are words in no
    order, and an answer that was asked to be in another script or language counts as one.
    """
    words = _WORD.findall(response)
    if not words:
        return "empty"
    scripts = _scripts(response)
    unspaced = _main(scripts) in _UNSPACED
    if _repeats(list("".join(words)) if unspaced else words):
        return "repetition"
    if _is_gibberish(response, scripts, [] if unspaced else words):
        return "gibberish"
    asked_in, answered_in = _language(prompt), _language(response)
    if asked_in and answered_in and asked_in != answered_in:
        return "other_language"
    if asked_in in ("", "English") and _is_no_english(response, prompt):
        return "gibberish"
    asked = _main(_scripts(prompt))
    return "other_script" if asked and _main(scripts) not in (asked, "") else None


def _repeats(parts: list[str]) -> bool:
    """Whether all of it is a loop, or its end is."""
    return len(parts) >= 12 and (_is_loop(parts) or _is_loop(parts[-50:]))


def _is_loop(parts: list[str]) -> bool:
    sequences = [tuple(parts[i : i + 4]) for i in range(len(parts) - 3)]
    return len(set(sequences)) < 0.3 * len(sequences)


def _language(text: str) -> str:
    """The language whose frequent words make up a fifth of the words; empty if none is far ahead."""
    words = _WORD.findall(text.lower())
    counts = Counter({name: sum(word in known for word in words) for name, known in _FREQUENT.items()})
    (name, most), (_, second) = counts.most_common(2)
    return name if len(words) >= 5 and most >= max(2, 0.2 * len(words), 1.5 * second) else ""


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
    english = _FREQUENT["English"]
    if len(words) < 10 or not english.intersection(_WORD.findall(prompt.lower())):
        return False
    return sum(word.lower() in english for word in words) < 0.12 * len(words)


def _main(scripts: Counter[str]) -> str:
    """The script of most letters; empty without letters."""
    return scripts.most_common(1)[0][0] if scripts else ""


def _scripts(text: str) -> Counter[str]:
    """Letters by script, the first word of a letter's Unicode name; Japanese counts as one."""
    letters = (character for character in text if character.isalpha())
    names = (unicodedata.name(letter, "?").split(maxsplit=1)[0] for letter in letters)
    japanese = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
    return Counter(japanese.get(name, name) for name in names)
