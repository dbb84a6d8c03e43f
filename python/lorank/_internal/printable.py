r"""Foreign text in a printable form: names, paths and texts of files are shown, but never act.

Characters that are invisible, or that a terminal obeys, appear as the escapes of Python and YAML, such as
``\x1b``. Letters of every script, symbols and emoji stay.
"""

from __future__ import annotations

import re

_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

# Characters that `str.isprintable` accepts and that show nothing: joiners, fillers and variation selectors.
# The selectors of text and emoji style stay after a symbol.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
    "|(?<![\xa9\xae\u203c-\u27ff\u2900-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]"
)
_BACKSLASHES = re.compile(r"\\+(?=(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])?)")

# Characters of a name that are shown at either end.
_ENDS = 500


def printable(text: str) -> str:
    r"""Return a text in which every invisible or control character is an escape.

    Backslashes of the text stay, so that a text may be made printable twice.

    Examples
    --------
    >>> printable("mod\u00e8le\x1b[2J\n")
    'modèle\\x1b[2J\\n'
    """
    if text.isprintable() and not _BLANK.search(text):
        return text
    text = _BLANK.sub(lambda found: escaped(found[0]), text)
    return "".join(char if char.isprintable() else escaped(char) for char in text)


def printable_name(name: str, ends: int = _ENDS) -> str:
    r"""Return a name like `printable`, so that different names differ; cut by `shortened` if it is long.

    Backslashes that could be read as the start of an escape are doubled.

    Examples
    --------
    >>> printable_name("\x1b"), printable_name(r"\x1b"), printable_name(r"layers\.0")
    ('\\x1b', '\\\\x1b', 'layers\\.0')
    """
    name = shortened(name, ends)
    if "\\" not in name:
        return printable(name)

    def doubled(run: re.Match[str]) -> str:
        follower = name[run.end() : run.end() + 1]
        is_escape = bool(run[1]) or printable(follower) != follower
        return run[0] * 2 if is_escape else run[0]

    return printable(_BACKSLASHES.sub(doubled, name))


def escaped(char: str) -> str:
    r"""Return the escape of a character, which Python and YAML read: ``\x1b``, ``\u202e``, ``\U000e0001``."""
    code = ord(char)
    digits = f"x{code:02x}" if code < 0x100 else f"u{code:04x}" if code < 0x10000 else f"U{code:08x}"
    return _SHORT.get(char, f"\\{digits}")


def encodable(text: str) -> str:
    """Return a text that UTF-8 can express: lone surrogates become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shortened(text: str, ends: int) -> str:
    """Return both ends of a text that is too long to show, with the number of characters between them.

    Examples
    --------
    >>> shortened("layers." + "x" * 90_000 + ".weight", 7)
    'layers....[90,000 characters left out]....weight'
    """
    left_out = len(text) - 2 * ends
    if left_out <= ends:
        return text
    return f"{text[:ends]}...[{left_out:,} characters left out]...{text[-ends:]}"
