"""Errors of the command line, by exit status."""

from __future__ import annotations


class UsageError(Exception):
    """An argument or a combination of options is wrong: exit status 2."""


class IncompleteError(Exception):
    """The command finished, but some items failed: exit status 1."""


class UndecidedError(Exception):
    """The command finished, but the files do not decide the question: exit status 3."""
