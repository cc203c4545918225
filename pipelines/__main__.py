"""The console script `bdpo`: `bdpo run ...` is `python -m pipelines.run ...`, and so on."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "run": "pipelines.run",
    "score": "pipelines.score",
    "train": "pipelines.train",
    "evaluate": "pipelines.evaluate",
    "tamper": "pipelines.tamper",
    "search": "tune.search",
    "experiment": "pipelines.experiment",
    "attack": "pipelines.attack",
    "agreement": "pipelines.agreement",
    "gate": "pipelines.gate",
    "preflight": "pipelines.preflight",
    "status": "pipelines.status",
    "report": "pipelines.report",
    "init": "pipelines.init",
    "presets": "pipelines.presets",
    "tiny-model": "pipelines.tiny_model",
}
"""Subcommand -> the module whose `main` it calls; the first line of its docstring is its help."""


def main() -> None:
    """Call the command that the first argument names; exit 0 with the list of commands for --help, else 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"bdpo {name}", *arguments]  # what a command's own help calls it
        import_module(COMMANDS[name]).main()
    elif name in ("-h", "--help"):
        print("usage: bdpo COMMAND ...   (bdpo COMMAND --help shows its options)\n")
        for command, module in COMMANDS.items():
            print(f"  {command:<11} {(import_module(module).__doc__ or '').splitlines()[0]}")
    else:
        print(f"error: unknown command {name}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
