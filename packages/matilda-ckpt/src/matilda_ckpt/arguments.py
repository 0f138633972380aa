"""Command lines that teach: examples under the help, a mistake answered by the nearest right name.

matilda-ckpt, matilda-data and matilda-train have this file each, for none imports another's.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

__all__ = ["TeachingParser"]

# What other programs, and ours beside this one, call the same thing.
ALIKE = (("run", "run-dir"), ("out", "out-dir", "output", "output-dir", "run-dir", "write"))


class TeachingParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help keeps its line breaks and whose errors are one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `ArgumentParser`'s; what was given is kept for the error."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and what was probably meant; exit code 2."""
        self.exit(2, f"error: {self._explained(message)}\n")

    def _explained(self, message: str) -> str:
        # An option that does not exist explains a required one that is missing, not the reverse.
        options = list(self._options())
        for word in self._given:
            name = word.partition("=")[0]
            if word == "--":
                break
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                return f"there is no option `{name}`; {self._meant(name, options)}"
        choice = re.fullmatch(
            r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.S
        )
        if choice is None:
            return f"{message}; `{self.prog} --help` explains."
        what, given, listed = choice.groups()
        choices = [name.strip("'") for name in listed.split(", ")]
        kind = f"`{what}`" if what.startswith("-") else what.lower()
        return f"{given!r} is no {kind}; {_nearest(given, choices)}"

    def _meant(self, name: str, options: Sequence[str]) -> str:
        words = [action.metavar for action in self._actions if not action.option_strings]
        given = name.removeprefix("--")
        for names in ((given,), *(names for names in ALIKE if given in names)):
            for other in names:
                if other.upper() in words:
                    return f"give {other.upper()} by itself, as `{self.prog} --help` shows."
                if f"--{other}" in options:
                    return f"did you mean `--{other}`?"
        return _nearest(name, options)

    def _options(self) -> Iterator[str]:
        """The long options of this parser and of its subcommands."""
        for action in self._actions:
            yield from (option for option in action.option_strings if option.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()


def _nearest(given: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(sorted(set(names)))}."
