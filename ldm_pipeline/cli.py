"""The `ldm` command: reads the arguments, calls one module of `commands/`, words the errors.

Exit codes: 0 done, 1 done and what was looked at is wrong (`ldm dataset check` says what), 2 a
mistake in the arguments or a disk that fails (one line on stderr), 130 interrupted, 141 nobody
reads the output. Only the standard library is imported here, and a command's own module only when
that command is asked for, so that help and refusals answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast

from ldm_pipeline.commands import Command
from ldm_pipeline.errors import UserError, nearest, suggestion
from ldm_pipeline.too_large import is_out_of_memory

COMMANDS = ("generate", "show", "info", "convert", "evaluate", "dataset", "lora")
EMPTY = "is empty; name a file or a folder"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option, and no abbreviations.

    Options and prompts may come in any order, which sub-parsers of argparse do not allow: hence
    one parser for each command.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a `UserError`, which `main` prints in one line."""
        if wrong := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message):
            flag, kind, value = wrong.groups()
            message = f"{flag}={value} must be a {'whole ' * (kind == 'int')}number"
        elif message.endswith(EMPTY):
            message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; `UserError` for what is unknown, with the nearest option."""
        before_prompts = arguments[: [*arguments, "--"].index("--")]
        if "-h" in before_prompts or "--help" in before_prompts:
            self.print_help()  # not left to intermixed parsing, which hides the positionals' help
            self.exit()
        args, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {flag!r}{suggestion(flag, self._option_string_actions)}")
        return args


def _path(text: str) -> Path:
    """A path as it was typed; without a name it would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return Path(text)


def _command(name: str) -> Command:
    """The module of one command."""
    return cast(Command, import_module(f"{__package__}.commands.{name}"))


def _overview() -> str:
    """What `ldm --help` prints."""
    lines = ["usage: ldm COMMAND [arguments]", "", "Words to pictures, on this machine.", ""]
    lines += [f"  ldm {name:9} {_command(name).PURPOSE}" for name in COMMANDS]
    lines += [
        "",
        "`ldm COMMAND --help` lists what a command takes; `ldm --version` the version.",
        "",
        '  ldm generate "a red star above a blue house" -o star.png',
    ]
    return "\n".join(lines)


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` (without the program's name) asks for.

    Raises `UserError` for a mistake in them.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    name, rest = arguments[0], arguments[1:]
    if name in ("--version", "-V"):
        from ldm_pipeline import __version__

        print(f"ldm {__version__}")
        return
    if name not in COMMANDS:
        known = f"; the commands are {', '.join(COMMANDS)}"
        guess = nearest(name, COMMANDS)
        raise UserError(
            f"unknown command {name!r}{known}" + (f"; did you mean {guess!r}?" if guess else "")
        )
    command = _command(name)
    parser = Parser(f"ldm {name}", command.PURPOSE)
    command.add_arguments(parser)
    command.run(parser.parse(rest))


def ended(name: str, act: Callable[[], None]) -> int:
    """Do `act`, the work of the program `name`; word what ends it, and return the exit code."""
    try:
        act()
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # what no command has better advice for
        if not is_out_of_memory(error):
            raise
        print(f"{name}: out of memory: free some, or take smaller files", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `ldm show x | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a file that went away or may not be read
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{name}: " + " ".join(told.split()), file=sys.stderr)
        return 2
    except SystemExit as leave:  # argparse leaves this way after printing a command's help
        return leave.code if isinstance(leave.code, int) else 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ldm` with `arguments` (default: the process's own) and return the exit code."""
    return ended("ldm", lambda: dispatch(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
