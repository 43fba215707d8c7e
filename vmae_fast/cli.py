"""The command line: vmae-fast pretrain | preview | check | reconstruct | convert | ..."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

# Each is vmae_fast/commands/<name>.py, loaded when it is asked for.
COMMANDS = {
    "pretrain": "train a VideoMAE on a folder of videos (or on made ones)",
    "preview": "draw what a model is fed: frames, masks, files and times",
    "check": "read every file of a data set: what it holds, what is bad, how quick it loads",
    "pack": "rewrite a data set once, into short videos that are quick to read",
    "plan": "say what a run takes: memory, largest batch, time",
    "reconstruct": "show what a checkpoint makes of a masked video",
    "convert": "write a checkpoint in another dialect",
    "inspect": "say what a checkpoint is",
    "env": "print versions, devices, backends and decoders",
}
# What to try first, and what it is.
_EXAMPLES = {
    "vmae-fast pretrain": "the demonstration: a small model learns in minutes, on a CPU too",
    "vmae-fast pretrain --data /my/videos --steps 500": "the same on your own videos",
    "vmae-fast plan --config v1-base-k400 --gpu a100": "what a real run takes",
}
# What to do about errors of the system, where whoever raised them did not say.
_NEXT = {
    errno.ENOENT: "; check the path",
    errno.EACCES: "; take another place, or change who may read and write there",
    errno.EPERM: "; take another place, or change who may read and write there",
    errno.EROFS: "; that disk cannot be written to: take another place",
    errno.ENOSPC: "; make room on that disk, or write elsewhere",
    errno.EDQUOT: "; make room on that disk, or write elsewhere",
    errno.EFBIG: "; files there may not get as large: write elsewhere",
}
# Packages that are installed under another name than they are imported by.
_INSTALLED_AS = {"PIL": "pillow"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors a user can mend are one message."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        from vmae_fast import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"vmae-fast: no command {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    # Threads that wait for each other by spinning double a small model's time where other
    # processes want the cores; sleeping costs it half as much again where they do not
    # (benchmarks/NOTES.md). The user's own setting holds. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(args[0], args[1:])
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "vmae_fast"):
            raise
        package = _INSTALLED_AS.get(missing, missing)
        gone = isinstance(error, ModuleNotFoundError)
        say = "is not installed" if gone else f"cannot be imported ({error})"
        install = "pip install" if gone else "pip install --force-reinstall"
        print(f"vmae-fast: the package {package} {say}; {install} {package}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; checkpoints written before are kept" if args[0] == "pretrain" else ""
        print(f"vmae-fast: interrupted{kept}", file=sys.stderr)
        return 130


def _run(command: str, args: list[str]) -> int:
    """Run a command; an error that a user can mend is printed, and its status is 1."""
    from vmae_fast.data import DataError, DecodeError
    from vmae_fast.models import CheckpointError
    from vmae_fast.ops import BackendError
    from vmae_fast.train import ConfigError, RunError

    mendable = (
        DataError,
        DecodeError,
        CheckpointError,
        ConfigError,
        RunError,
        BackendError,
        OSError,
    )
    try:
        status: int = import_module(f"vmae_fast.commands.{command}").run(args)
    except BrokenPipeError:
        # Whoever reads what is printed has enough (`| head`); nothing more can be flushed there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except mendable as error:
        hint = _NEXT.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        print(f"vmae-fast: {error}{hint}", file=sys.stderr)
        return 1
    return status


def _overview() -> str:
    """The commands, and what to try first."""
    width = max(shutil.get_terminal_size().columns, 40)
    longest = max(map(len, COMMANDS)) + 4
    lines = ["usage: vmae-fast COMMAND [options]", "", "commands"]
    for name, what in COMMANDS.items():
        above = f"  {name}".ljust(longest)
        lines.append(
            textwrap.fill(what, width, initial_indent=above, subsequent_indent=" " * longest)
        )
    lines += ["", "to begin with"]
    for command, what in _EXAMPLES.items():
        lines += textwrap.wrap(command, width, initial_indent="  ", break_on_hyphens=False)
        lines += textwrap.wrap(what, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "vmae-fast COMMAND --help shows a command's flags"])


if __name__ == "__main__":
    sys.exit(main())
