"""A timer as a descriptor: timerfd_create(2), which Python's os has from 3.13 on.

Flows in: seconds. Flows out: a descriptor that poll(2) finds readable when they are over.
"""

import ctypes
import os
import time

_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK and TFD_CLOEXEC are these


class _Setting(ctypes.Structure):
    """struct itimerspec: the interval, which is not used, and the time until the timer is over."""

    _fields_ = (("interval", ctypes.c_long * 2), ("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Timer:
    """Runs once each time it is started."""

    def __init__(self) -> None:
        """Make it, not running. Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(self._libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS))
        if self._fd < 0:
            raise _failure()

    def fileno(self) -> int:
        """Descriptor that is readable from the end of the time on until `start` or `stop`."""
        return self._fd

    def start(self, seconds: float) -> None:
        """Run for this time, from now on; a time that runs is forgotten. Raises OSError."""
        nanoseconds = max(1, round(seconds * 1e9))
        setting = _Setting((0, 0), *divmod(nanoseconds, 10**9))
        if self._libc.timerfd_settime(self._fd, 0, ctypes.byref(setting), None):
            raise _failure()

    def stop(self) -> None:
        """Forget the time that runs or is over. Raises OSError."""
        if self._libc.timerfd_settime(self._fd, 0, ctypes.byref(_Setting()), None):
            raise _failure()

    def close(self) -> None:
        """Free the descriptor. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"timer: {os.strerror(number)}")
