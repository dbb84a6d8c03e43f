"""Foreign text in a Markdown file and in the YAML of its front matter."""

from __future__ import annotations

import re

from lorank._internal.printable import printable, shortened

# Characters of a text at either end that are shown.
_ENDS = 2000

# Characters that begin markup anywhere in a line. Underscores within words and lone colons are plain.
_ANYWHERE = re.compile(
    r"[\\`*\[\]<&|~$#!^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=\S)|(?<=www)\.|@(?=\S)", re.IGNORECASE
)
# Beginnings of lines that are markup: lists, headings and rules.
_AT_START = re.compile(r"([+=>-]|\d+(?=[.)]))")


def markdown_text(text: str) -> str:
    r"""Return the Markdown that shows a text on one line, without markup.

    Examples
    --------
    >>> print(markdown_text("org/my_model, avg_rank=3"), markdown_text("# <img src=x>\n"))
    org/my_model, avg_rank=3 \# \<img src=x>\\n
    """
    shown = printable(shortened(text, _ENDS)).strip()
    start = _AT_START.match(shown)
    marked = _ANYWHERE.sub(lambda found: f"\\{found[0]}", shown)
    if start is None:
        return marked
    length = len(start[1])
    return f"{marked[:length]}\\{marked[length:]}" if start[1][0].isdigit() else f"\\{marked}"


def yaml_string(text: str) -> str:
    r"""Return the double-quoted scalar of YAML whose value is a text.

    The scalar never holds ``---``, at which simple readers end the front matter.

    Examples
    --------
    >>> print(yaml_string("org/model\nlicense: mit"))
    "org/model\nlicense: mit"
    """
    quoted = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return '"' + quoted.replace("--", r"-\x2d") + '"'
