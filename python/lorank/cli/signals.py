"""Signals that end a command: cleanup runs, and the status is that of the signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Actions of a process that nobody has changed. An ignored signal, as under nohup, stays ignored.
_UNCHANGED = (signal.SIG_DFL, signal.default_int_handler)


class SignalInterrupt(KeyboardInterrupt):
    """A signal asks the process to end; the code that cleans up after Ctrl-C cleans up after it too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupted(BaseException):
    """A command has ended by a signal.

    Parameters
    ----------
    message
        The message for the user.
    status
        The exit status: 128 and the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def by(cls, error: KeyboardInterrupt, advice: str = "") -> Interrupted:
        """Return the end of a command by a KeyboardInterrupt, with advice on how to continue."""
        number = getattr(error, "number", signal.SIGINT)
        verb = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        return cls(f"{verb}; {advice}" if advice else verb, 128 + number)


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Raise `SignalInterrupt` in the block for each signal that asks the process to end."""
    with _handling(_raise):
        yield


@contextmanager
def ending_signals_exit() -> Iterator[None]:
    """Exit at once for each signal that asks the process to end, as long as there is nothing to clean up.

    An interactive Python keeps its own action.
    """
    if hasattr(sys, "ps1") or "IPython" in sys.modules:
        yield
        return
    with _handling(_exit):
        yield


@contextmanager
def _handling(action: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    changed = [number for number in _ENDING if before[number] in _UNCHANGED]
    for number in changed:
        signal.signal(number, action)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    raise SignalInterrupt(number)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    try:
        os.write(2, f"lorank: {Interrupted.by(SignalInterrupt(number))}\n".encode())
    finally:
        os._exit(128 + number)
