"""Text as a reader sees it: two spellings that look the same are the same name, and the same target."""

from __future__ import annotations

import functools
import unicodedata

# Unicode's Default_Ignorable_Code_Point, which is in no module of Python: what is drawn as nothing.
_IGNORABLE = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
_BLANK_BRAILLE = "\u2800"
_INVISIBLE = frozenset({"Cc", "Cf", "Cs"})
"""Categories that are drawn as nothing: controls, formats and half surrogates."""


@functools.lru_cache(4096)
def plain_text(text: str) -> str:
    """Return ``text`` in NFC without invisible characters; white space becomes single spaces, none at the ends."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    spaced = (" " if letter.isspace() or letter == _BLANK_BRAILLE else letter for letter in text)
    visible = "".join(letter for letter in spaced if not _is_invisible(letter))
    return " ".join(unicodedata.normalize("NFC", visible).split())


def _is_invisible(letter: str) -> bool:
    code = ord(letter)
    return unicodedata.category(letter) in _INVISIBLE or any(first <= code <= last for first, last in _IGNORABLE)
