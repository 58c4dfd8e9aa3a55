"""The command line of every program: a flag per field of a dataclass, and a user's mistake in one line.

    @dataclass
    class Config:
        batch_size: int = flag(8, "samples per micro-batch", at_least=1)

    with bad_input_in_one_line("program.py"):
        cfg = parse(Config)

A text flag takes the word as it was typed; a number must be in the range that its field declares, and a tuple flag
takes words with commas between. The same check is made for objects that Python code builds (`check_values` in
`__post_init__`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any, NoReturn, TypeVar

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

LARGEST = 2**31 - 1
"""Largest whole number of a flag that states no other limit."""
LONGEST = 4000
"""Most bytes of a text flag; the operating system takes no longer path."""
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
MISTAKES = (ValueError, KeyError, OSError)
"""What a user's mistake raises. KeyError: a name that a data set or its statistics do not have."""


class UsageError(ValueError):
    """A flag that cannot be used; the message names it, what was found and what was expected."""


@dataclass(frozen=True)
class Range:
    """The numbers a flag takes. Not finite ones only when `infinite` says so, and never NaN."""

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return False
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.more_than is not None and value <= self.more_than)
            or (self.at_most is not None and value > self.at_most)
            or (self.less_than is not None and value >= self.less_than)
        )

    def __str__(self) -> str:
        limits = (self.at_least, self.more_than, self.at_most, self.less_than)
        words = ("at least", "more than", "at most", "less than")
        said = [f"{word} {limit}" for word, limit in zip(words, limits, strict=True) if limit is not None]
        return " and ".join(said) or "a finite number"


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of another code base.

    use: what to do instead, for the message. harmless: values that change nothing here, lower case; they are accepted
    with a note. None: every value is.
    """

    use: str
    harmless: tuple[str, ...] | None = ()

    def is_harmless(self, value: str) -> bool:
        """Whether the value asks for what is done anyway."""
        return self.harmless is None or value.lower() in self.harmless


def flag(default: Any, text: str = "", *, choices: Sequence[str] = (), is_name: bool = False, **limits: Any) -> Any:
    """A dataclass field with its help text and its `Range`, given by the names of its limits, or its choices.

    is_name: the text becomes the name of a file or folder and must be one.
    """
    metadata = {"help": text, "range": Range(**limits), "choices": tuple(choices), "name": is_name}
    return field(default=default, metadata=metadata)


def flag_like(config: type[DataclassInstance], name: str, default: Any) -> Any:
    """A field with the help text and the range of another config's, which declares them, and a default of its own."""
    return field(default=default, metadata=config.__dataclass_fields__[name].metadata)


# ---------------------------------------------------------------------------------------------------- words to values


def parse(
    config: type[Config],
    args: Sequence[str] | None = None,
    foreign: Mapping[str, ForeignFlag] | None = None,
    description: str | None = None,
) -> Config:
    """The flags of a program, from `args` or the command line. `--help` prints them and exits with 0.

    Raises UsageError for an unknown flag, a missing value, a value that is none of the flag's type or range, and
    whatever the config itself refuses. TypeError for a config with a number that declares no range.
    """
    words = list(sys.argv[1:] if args is None else args)
    known = {entry.name: entry for entry in fields(config) if entry.init}
    kinds = typing.get_type_hints(config)
    for name, entry in known.items():
        if {int, float} & {kinds[name], *typing.get_args(kinds[name])} and "range" not in entry.metadata:
            raise TypeError(f"{config.__name__}.{name} is a number without `flag(...)`, which declares its range")
    if _asks_for_help(words):
        _help_parser(config, description).print_help()
        raise SystemExit(0)
    values = {}
    for name, word in _pairs(words, set(known), foreign or {}):
        values[name] = _value(known[name], kinds[name], word)
    made = config(**values)
    check_values(made)
    return made


def split_places(text: str) -> list[str]:
    """Files or folders with commas between; a text that is the name of an existing one is that, commas and all."""
    return [text] if os.path.exists(text) else [word.strip() for word in text.split(",") if word.strip()]


def given_flags(args: Sequence[str] | None = None) -> set[str]:
    """Names of the flags among the words of a command line."""
    words = sys.argv[1:] if args is None else args
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def check_switches(config: object, given: Iterable[str], switches: Mapping[str, tuple[bool, str]]) -> None:
    """UsageError for the first of the given flags that nothing reads without another flag.

    switches: flags by name or prefix -> (their switch is on, the switch). A flag that is False asks for nothing.
    """
    for name in sorted(given):
        for prefix, (is_on, switch) in switches.items():
            value = getattr(config, name, "")
            if name.startswith(prefix) and not is_on and value is not False:
                raise UsageError(f"--{name} {value} has no effect: it needs {switch}")


def _asks_for_help(words: Sequence[str]) -> bool:
    """`--help` anywhere, or `-h` where a flag may stand: behind a flag it is that flag's text."""
    behind = [None, *words]
    return "--help" in words or any(
        word == "-h" and (before is None or not before.startswith("--") or "=" in before)
        for before, word in zip(behind, words, strict=False)
    )


def _pairs(words: Sequence[str], known: set[str], foreign: Mapping[str, ForeignFlag]) -> Iterator[tuple[str, str]]:
    """(name, value) of each flag; the notes about foreign ones go to stderr."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"found {word!r}, expected --FLAG VALUE; text with blanks needs quotes")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known and name not in foreign:
            raise UsageError(f"--{name}: no such flag{nearest(name, known, '--')}; --help lists them")
        if not equals:
            if not rest or given_flags(rest[:1]) & (known | set(foreign)):
                raise UsageError(f"--{name}: found no value, expected one behind it")
            value = rest.pop(0)
        if name in known:
            yield name, value
        elif foreign[name].is_harmless(value):
            print(f"note: --{name} {value} changes nothing here: {foreign[name].use}", file=sys.stderr)
        else:
            raise UsageError(f"--{name} {value} is a flag of another code base: {foreign[name].use}")


def _value(entry: Field, kind: Any, word: str) -> Any:
    if typing.get_origin(kind) is tuple:
        parts = word.split(",") if word or entry.default else []  # an empty default: none may be given
        return tuple(
            _read(entry, typing.get_args(kind)[0], part.strip(), ", or several with commas between") for part in parts
        )
    options = list(typing.get_args(kind)) if isinstance(kind, types.UnionType) else [kind]
    if types.NoneType in options:
        if word == "None":
            return None
        options.remove(types.NoneType)
    for option in options[:-1]:  # `bool | str`: the first that fits
        try:
            return _read(entry, option, word)
        except UsageError:
            continue
    return _read(entry, options[-1], word)


def _read(entry: Field, kind: Any, word: str, several: str = "") -> Any:
    if kind is str:
        return word
    if kind is bool:
        if word.lower() not in _BOOLEANS:
            raise UsageError(f"--{entry.name} is {word!r}, expected True or False")
        return _BOOLEANS[word.lower()]
    if _is_enum(kind):
        return _member(entry.name, kind, word)
    try:
        return kind(word)
    except (ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"--{entry.name} is {word!r}, expected {what}{_range_text(entry)}{several}") from None


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _member(name: str, kind: type[Enum], word: str) -> Enum:
    try:
        return kind(word.lower())
    except ValueError:
        raise UsageError(f"--{name} is {word!r}, expected {one_of([m.value for m in kind], word)}") from None


def _help_parser(config: type, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, entries in groups_of(config).items():
        group = parser.add_argument_group(title) if title else parser
        for entry in entries:
            default = entry.default.value if isinstance(entry.default, Enum) else entry.default
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
            choices = ", ".join(entry.metadata.get("choices", ()))
            text = "; ".join(filter(None, (entry.metadata.get("help", ""), choices, _range_text(entry)[2:])))
            shown = "" if default is MISSING else f"(default: {default})"
            help_text = f"{text} {shown}".strip().replace("%", "%%")
            group.add_argument(f"--{entry.name}", metavar=str(entry.type).replace(" ", ""), help=help_text)
    return parser


def groups_of(config: type) -> dict[str, list[Field]]:
    """The flags of a config by the `group` of the dataclass that declares them; "" for a config without groups."""
    homes = {name: base.__dict__.get("group", "") for base in reversed(config.__mro__) for name in _declared(base)}
    found: dict[str, list[Field]] = {}
    for entry in fields(config):
        if entry.init:
            found.setdefault(homes[entry.name], []).append(entry)
    return found


def _declared(base: type) -> list[str]:
    return list(base.__dict__.get("__annotations__", ()))


def _range_text(entry: Field) -> str:
    numbers = entry.metadata.get("range")
    limits = str(numbers) if numbers is not None else ""
    return f", {limits}" if limits and limits != "a finite number" else ""


# ------------------------------------------------------------------------------------------------------------- checks


def check_values(config: Any) -> None:
    """Types, ranges, choices and names of a config's fields. A text in place of a named choice becomes that choice.

    Raises UsageError for the first that does not fit.
    """
    kinds = typing.get_type_hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        named = [kind for kind in (kinds[entry.name], *typing.get_args(kinds[entry.name])) if _is_enum(kind)]
        if named and type(value) is str:  # from Python; equal to the choice, and not the same
            value = _member(entry.name, named[0], value)
            setattr(config, entry.name, value)
        if value is None or value == entry.default:
            continue
        for part in value if isinstance(value, tuple) else (value,):
            _check_value(entry, part)


def _check_value(entry: Field, value: Any) -> None:
    numbers, choices = entry.metadata.get("range"), entry.metadata.get("choices")
    if isinstance(value, int | float) and not isinstance(value, bool) and numbers is not None:
        _check_number(entry.name, value, numbers)
    elif isinstance(value, str):
        _check_text(entry.name, value)
    if choices and value not in choices:
        raise UsageError(f"--{entry.name} is {value!r}, expected {one_of(choices, str(value))}")
    if entry.metadata.get("name"):
        check_name(f"--{entry.name}", value)


def _check_number(name: str, value: float, numbers: Range) -> None:
    if isinstance(value, int) and numbers.at_most is None and numbers.less_than is None and abs(value) > LARGEST:
        raise UsageError(f"--{name} is {value}, expected at most {LARGEST}")
    if value not in numbers:
        finite = "" if math.isfinite(value) or numbers.infinite or numbers == Range() else "a finite number, "
        raise UsageError(f"--{name} is {value}, expected {finite}{numbers}")


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise UsageError(f"--{name}: found a NUL character in {text[:100]!r}, expected text")
    if len(text.encode(errors="replace")) > LONGEST:
        raise UsageError(f"--{name}: found {len(text):,} characters, expected at most {LONGEST:,} bytes")


def check_name(what: str, name: str) -> None:
    """UsageError unless a text can name a file in one folder.

    What a shell or another system would read as something else is refused. A colon is taken: times of day are names.
    """
    bad = sorted({character for character in name if character in '/\\*?"<>|' or not character.isprintable()})
    if bad:
        raise UsageError(f"{what} is {name!r} with {' '.join(map(repr, bad))}, expected a name, not a path or pattern")
    if not name or name != name.strip() or name.startswith((".", "-")) or len(name.encode()) > 200:
        raise UsageError(
            f"{what} is {name!r}, expected a name of 1 to 200 bytes that starts with neither dot nor dash and has "
            "no blanks around it"
        )


def require_package(what: str, package: str, extra: str) -> None:
    """UsageError unless an optional package is there; `what` asks for it, `extra` of this project installs it."""
    if not is_installed(package):
        raise UsageError(f"{what} needs {package}, which is not installed: pip install 'craft-vla[{extra}]'")


def is_installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # a finder that forbids it
        return False


def nearest(word: str, known: Sequence[str] | set[str], prefix: str = "") -> str:
    """`; did you mean ...?` for the known word that is most like this one or has it as initials (lr), or nothing."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    found = found or [name for name in lower if "_" in name and _initials(name) == word.lower()]
    return f"; did you mean {prefix}{lower[found[0]]}?" if found else ""


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))


def one_of(choices: Sequence[str], word: str) -> str:
    """What was expected in place of a word that is none of the choices, for a message."""
    return f"one of {', '.join(map(str, choices))}{nearest(word, choices)}"


# ------------------------------------------------------------------------------------------------------ how it ends


class OneLineParser(argparse.ArgumentParser):
    """argparse for the programs with positional arguments: its errors are one line, its flags are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and words[0].startswith("--"):
            known = {option[2:] for option in self._option_string_actions if option.startswith("--")}
            name = words[0][2:].partition("=")[0]
            message = f"--{name}: no such flag{nearest(name, known, '--')}; --help lists them"
        self.exit(2, f"{self.prog}: error: {message}\n")


def in_range(kind: type, **limits: Any) -> Callable[[str], float]:
    """`type=` of an argparse flag: an int or a float in the `Range` of these limits."""
    all_limits: dict[str, Any] = {"at_most": LARGEST} | limits
    allowed = Range(**all_limits)

    def read(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"found {word!r}, expected {'a whole number, ' * (kind is int)}{allowed}")
        return value

    return read


@contextmanager
def bad_input_in_one_line(program: str, mistakes: tuple[type[Exception], ...] = MISTAKES) -> Iterator[None]:
    """Flags and files that do not fit end the program with one line on stderr and exit code 2, as argparse does."""
    try:
        yield
    except mistakes as error:
        _once_of_all_processes()
        _end(program, error, 2)


@contextmanager
def faults_in_one_line(program: str, faults: tuple[type[Exception], ...]) -> Iterator[None]:
    """Faults that are known by name end the program with one line on stderr and exit code 1."""
    try:
        yield
    except faults as error:
        _end(program, error, 1)


def _end(program: str, error: Exception, code: int) -> NoReturn:
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def parse_or_exit(config: type[Config], description: str | None = None) -> Config:
    """The flags of this command line; what cannot be used ends the program with one line and exit code 2."""
    with bad_input_in_one_line(os.path.basename(sys.argv[0])):
        return parse(config, description=description)


def _once_of_all_processes() -> None:
    """Let rank 0 speak first: it ends all processes of the run, so that what all of them found is said once."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
