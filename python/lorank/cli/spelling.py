"""Messages of the library with arguments spelled as options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# The lookbehind excludes parts of paths.
_ARGUMENT = re.compile(
    r"(?<![\w./-])(?:(?P<given>rank_ratio|avg_rank|max_rank|energy|budget|scope|keep|exclude|prefix|"
    r"method|density|seed|election)=(?=\S)"
    r"|(?P<named>rank_ratio|avg_rank|max_rank|r_min|r_max)\b|(?P<flag>force|guess)=True)"
)


def as_options(message: str) -> str:
    """Replace arguments in a message by options: ``avg_rank=3`` becomes ``--avg-rank 3``."""

    def spelled(found: re.Match[str]) -> str:
        option = (found["given"] or found["named"] or found["flag"]).replace("_", "-")
        return f"--{option} " if found["given"] else f"--{option}"

    return _ARGUMENT.sub(spelled, message)


@contextmanager
def spelled_as_options(error_type: type[Exception] = ValueError) -> Iterator[None]:
    """Raise a ValueError of the block as `error_type`, with arguments in its message spelled as options."""
    try:
        yield
    except ValueError as error:
        raise error_type(as_options(str(error))) from error
