"""Received text, made fit to be shown."""

from __future__ import annotations

__all__ = ["printable", "shortened"]


def printable(text: str) -> str:
    """Return text with its control characters escaped, which a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 44) -> str:
    """Return a text without its middle if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
