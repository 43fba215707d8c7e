"""A decoder that takes its process down; in a module that processes of their own can import."""

import ctypes
import faulthandler
import os
import signal
import time

from vmae_fast.data import Clip, DecodeError, PathDecoder

SLOW_S = 0.2


def _crash(path):
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(path):
    # Else pytest's handler prints pages in the forked process.
    faulthandler.disable()
    ctypes.string_at(0)


def _abort(path):
    faulthandler.disable()
    os.abort()


def _exit(path):
    os._exit(7)


def _hang(path):
    # As a loop in C without a signal handler of its own: Python is never asked again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        pass


def _slow(path):
    time.sleep(SLOW_S)


def _unreadable(path):
    raise DecodeError(path, "merely unreadable")


def _strange(path):
    raise StrangeError("strange", 3)


class StrangeError(Exception):
    """Cannot be unpickled."""

    def __init__(self, text, number):
        super().__init__(text)


# By what a file's name begins with.
_FAULTS = {
    "crash": _crash,
    "segfault": _segfault,
    "abort": _abort,
    "exit": _exit,
    "hang": _hang,
    "slow": _slow,
    "unreadable": _unreadable,
    "strange": _strange,
}


class CrashingDecoder(PathDecoder):
    """Does at some files what a broken codec does: their names begin with it.

    Args:
        instead: what to do at all of these files, whatever their name says; None: that.
        log: folder that gets a file for each time that such a file was opened; None: none.
        only_once: folder by which it is known that a file was opened before: then it is sound.
    """

    def __init__(self, instead=None, log=None, only_once=None):
        super().__init__()
        self.instead, self.log, self.only_once = instead, log, only_once

    def read_clip(self, path, *arguments, **named) -> Clip:
        name = os.path.basename(path)
        fault = next((fault for fault in _FAULTS if name.startswith(fault)), None)
        if fault is not None:
            if self.log is not None:
                number = len(os.listdir(self.log))
                open(os.path.join(self.log, f"{number}-{name}"), "w").close()
            if self.only_once is None or self._first_time(name):
                _FAULTS[self.instead or fault](path)
        return super().read_clip(path, *arguments, **named)

    def _first_time(self, name):
        try:
            open(os.path.join(self.only_once, name), "x").close()
        except FileExistsError:
            return False
        return True
