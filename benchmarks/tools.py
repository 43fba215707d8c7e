"""NVIDIA's command-line tools, and what a part of the GPU suite tells the suite."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Exit status of a part that has nothing to do on this machine, as automake's tests have it.
SKIPPED = 77
NOTE = "NOTE "
# What a tool gets to write its report before it is killed.
GRACE_S = 5


def note(text: str) -> None:
    """Print a line for the suite's table."""
    print(NOTE + text, flush=True)


def notes_in(log: str) -> list[str]:
    """The lines that :func:`note` printed."""
    return [line[len(NOTE) :] for line in log.splitlines() if line.startswith(NOTE)]


def find_tool(name: str) -> str:
    """Path of a tool on PATH, in CUDA_HOME, CUDA_PATH or /usr/local/cuda; "" where it is not."""
    homes = [os.environ.get(home) for home in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in [*filter(None, homes), "/usr/local/cuda"]]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or ""


def run_limited(
    command: Sequence[str], log: Path, limit_s: float, **variables: str
) -> tuple[int | None, str]:
    """Run with the output in a file: the exit status, None past the limit, and the output."""
    with log.open("w") as into:
        child = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
            stdout=into,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            status: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(child.pid, signal.SIGINT)
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
        finally:
            # Where this process is stopped itself, its child goes too.
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return status, log.read_text(errors="replace")


def _heed_interrupts() -> None:
    """In a child: one that a shell's background job starts ignores them, as the job does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def short_name(signature: str) -> str:
    """A kernel's name without return type, namespaces, template and function arguments."""
    plain = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", signature)
    plain = re.sub(r"^(void|static|const)\s+", "", plain.strip())
    name = re.match(r"[\w:]+", plain)
    return name[0].split("::")[-1] if name else plain[:40]
