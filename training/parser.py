"""The parser of settings: dataclasses as options and settings as words; every problem in one message, a line for each."""

from __future__ import annotations

import difflib
import json
import math
import sys
import typing
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from decimal import Decimal

from transformers import HfArgumentParser


class _Help(ArgumentDefaultsHelpFormatter):
    """Tells no default of `None`: the text says what is done then."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class SettingsParser(HfArgumentParser):
    """Fields of dataclasses as options; an error is a line for each problem, without a list of all options."""

    def __init__(self, dataclass_types, description: str):
        self.wrong_values: list[str] = []
        super().__init__(dataclass_types, description=description, allow_abbrev=False, formatter_class=_Help)

    def add_argument(self, *names, **options):
        """As in argparse, but a value of the wrong type is noted and the default taken, so that others are seen too."""
        convert, default = options.get("type"), options.get("default")

        def converted(text: str):
            try:
                return convert(text)
            except (TypeError, ValueError, ArgumentTypeError):
                kind = getattr(convert, "__name__", convert).replace("string_to_bool", "bool")
                self.wrong_values.append(f"argument {names[0]}: invalid {kind} value: {text!r}")
                return default

        return super().add_argument(*names, **(options if convert is None else options | {"type": converted}))

    def error(self, message: str) -> typing.NoReturn:
        self.refuse([message])
        raise AssertionError  # there was a problem

    def refuse(self, problems: Sequence[str]) -> None:
        """Ends the program with all the problems, if there are any."""
        problems, self.wrong_values = [*self.wrong_values, *problems], []
        if not problems:
            return
        told = problems[0] if len(problems) == 1 else "\n".join([f"{len(problems)} problems", *(f"- {p}" for p in problems)])
        print(f"{self.prog}: error: {told}\n(--help lists all fields)", file=sys.stderr)
        raise SystemExit(2)

    def unknown_fields(self, unknown: Sequence[str], where: str) -> list[str]:
        """A line on words that are no field, if there are any; it names the field that was likely meant."""
        words = [word for word in unknown if word.startswith("--")] or unknown
        hints = []
        for name in (word.lstrip("-").partition("=")[0] for word in words):
            close = difflib.get_close_matches(name, self.field_names, n=1)
            hints.append(name + (f" (did you mean {close[0]}?)" if close else ""))
        return [f"unknown fields {where}: {', '.join(hints)}"] if hints else []

    @property
    def field_names(self) -> list[str]:
        return [f.name for kind in self.dataclass_types for f in fields(kind)]


def setting(default, description: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": description})
    return field(default=default, metadata={"help": description})


def range_problems(args, names: Sequence[str], rule: str, is_allowed: Callable) -> list[str]:
    """One line for each of the fields `names` whose value, unless it is `None`, breaks the rule."""
    values = {name: getattr(args, name) for name in names}
    return [f"{n} {rule}, got {value}" for n, value in values.items() if value is not None and not is_allowed(value)]


def choice_problems(args, choices: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each field whose value, unless it is `None`, is not one of its choices."""
    values = {name: getattr(args, name) for name in choices}
    wrong = {name: value for name, value in values.items() if value is not None and value not in choices[name]}
    problems = []
    for name, value in wrong.items():
        is_yaml_no = value == "False" and "no" in choices[name]
        hint = " (YAML reads a bare no as false: write it in quotes)" if is_yaml_no else ""
        problems.append(f"{name} must be one of {', '.join(choices[name])}, got {value}{hint}")
    return problems


def as_words(settings: dict) -> list[str]:
    """Settings as they are typed on a command line, so that recipes go through the same checks."""
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(_as_word, values)]
    return words


def _as_word(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{Decimal(str(value)):f}"  # argparse takes -1e-05 for an option
    return json.dumps(value) if isinstance(value, dict) else str(value)
