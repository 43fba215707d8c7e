"""The command line: vmae-fast pretrain | preview | check | reconstruct | convert | ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

# Each is vmae_fast/commands/<name>.py, loaded when it is asked for.
COMMANDS = {
    "pretrain": "train a VideoMAE on a folder of videos (or on made ones)",
    "plan": "say what a run takes: memory, largest batch, time, GPU-hours",
    "reconstruct": "show what a checkpoint makes of a masked video",
    "env": "print versions, devices, backends and decoders",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors a user can mend are one message."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: vmae-fast COMMAND [options]\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:12} {what}")
        print("\nvmae-fast COMMAND --help shows a command's options")
        return 0 if args else 2
    if args[0] == "--version":
        from vmae_fast import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(
            f"vmae-fast: no command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    # Threads that wait for each other by spinning double a small model's time where other
    # processes want the cores; sleeping costs it half as much again where they do not
    # (benchmarks/NOTES.md). The user's own setting holds. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        status: int = import_module(f"vmae_fast.commands.{args[0]}").run(args[1:])
    except mendable as error:
        print(f"vmae-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vmae-fast: interrupted; the last complete checkpoint is kept", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
