"""Readers of pictures that fail, in a module that processes of their own can import."""

import os
import signal
import time

from vmae_fast.data.segments import source_pictures


def failing(file, stride):
    """A file's pictures, unless its name says what happens at the third."""
    name = os.path.basename(file.path)
    for number, picture in enumerate(source_pictures(file, stride)):
        if number == 2 and name.startswith("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2 and name.startswith("strange"):
            raise IndexError("what a library\nmakes of it")
        yield picture


def slow(file, stride):
    """A file's pictures, one in a tenth of a second."""
    for picture in source_pictures(file, stride):
        time.sleep(0.1)
        yield picture
