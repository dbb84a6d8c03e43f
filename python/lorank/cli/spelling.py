"""Messages of the library with arguments spelled as options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# The lookbehind excludes parts of paths.
_ARGUMENT = re.compile(
    r"(?<![\w./-])(?:(?P<given>rank_ratio|avg_rank|max_rank|energy|budget|scope|keep|exclude|prefix)=(?=\S)"
    r"|(?P<named>rank_ratio|avg_rank|max_rank|r_min|r_max)\b|(?P<flag>force|guess)=True)"
)


def as_options(message: str) -> str:
    """Return a message with options for arguments: ``--avg-rank 3`` for ``avg_rank=3``."""

    def spelled(found: re.Match[str]) -> str:
        option = (found["given"] or found["named"] or found["flag"]).replace("_", "-")
        return f"--{option} " if found["given"] else f"--{option}"

    return _ARGUMENT.sub(spelled, message)


@contextmanager
def spelled_as_options(error_type: type[Exception] = ValueError) -> Iterator[None]:
    """Raise every ValueError of the block as `error_type`, with options for arguments in its message."""
    try:
        yield
    except ValueError as error:
        raise error_type(as_options(str(error))) from error
