"""The configs that come with the package, by name: `bdpo run --preset NAME` runs one from anywhere.

    python -m pipelines.presets

Every command that takes --config FILE takes --preset NAME as well, with the same overrides behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from bdpo.config import Config
from bdpo.errors import UserError

FOLDER = Path(__file__).parent / "configs"


def presets() -> dict[str, str]:
    """Name -> the first sentence of the preset's file."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: _first_sentence(file.read_text(encoding="utf-8")) for file in files}


def _first_sentence(text: str) -> str:
    """That of the comment at the top of a file."""
    comment = text.partition("\nrun_dir:")[0].replace("\n# ", " ").removeprefix("# ").partition("\n#")[0]
    return f"{comment.partition('. ')[0].rstrip('.:')}."


def preset_file(name: str) -> Path:
    """The YAML file of a preset.

    Raises:
        UserError: there is none of that name.
    """
    names = presets()
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"--preset {name}: unknown preset; {hint}")
    return FOLDER / f"{name}.yaml"


def with_preset_template(config: Config) -> Config:
    """The config with a preset's chat template, which it names from the clone, where it is installed."""
    template = config.model.chat_template
    if template is None or not template.startswith("pipelines/configs/") or Path(template).is_file():
        return config
    model = config.model.model_copy(update={"chat_template": str(FOLDER / Path(template).name)})
    return config.model_copy(update={"model": model})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print name and purpose of every preset."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    for name, purpose in presets().items():
        print(f"{name:<14} {purpose}")
    print(f"\nThe files are in {FOLDER}: copy one to change more of it than overrides should.")


if __name__ == "__main__":
    main()
