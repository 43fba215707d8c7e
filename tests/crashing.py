"""A decoder that takes its process down; in a module that processes of their own can import."""

import os
import signal

from vmae_fast.data import Clip, PathDecoder


class CrashingDecoder(PathDecoder):
    """Takes its process down at some files, as a broken codec does."""

    def read_clip(self, path, *arguments, **named) -> Clip:
        if "crash" in os.path.basename(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_clip(path, *arguments, **named)
