"""Keeps a child process from outliving its parent, even one that was killed with -9.

The parent holds the write end of a pipe and nothing else does; every child inherits the read end and
watches it. When the parent is gone, however it went, the kernel closes the write end and the child sees
the end of the file. On Linux the kernel also kills the child by itself, which works while the child is
in native code that keeps Python's lock.

    lifeline = Lifeline()                                    # parent
    subprocess.Popen([..., str(lifeline.fd)], pass_fds=[lifeline.fd])

    die_with_parent(int(sys.argv[1]))                        # child, first thing
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Lifeline:
    """The parent's side: one for all its children. `fd` is what they inherit, by the same number.

    Start the children from the main thread: Linux sends the death signal when the *thread* that made
    the child ends.
    """

    def __init__(self) -> None:
        self.fd, self._held = os.pipe()  # neither is inherited unless asked for

    def close(self) -> None:
        """Let go: every child that watches exits. Harmless when repeated."""
        for fd in (self.fd, self._held):
            if fd >= 0:
                os.close(fd)
        self.fd = self._held = -1


def die_with_parent(fd: int) -> None:
    """Exit this process, at once and without clean-up, when the holder of the lifeline is gone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent that died before the line above sends no signal; it left the pipe at its end.
    threading.Thread(target=_exit_at_eof, args=(fd,), name="lifeline", daemon=True).start()


def _exit_at_eof(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os._exit(1)
