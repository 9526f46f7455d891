"""Plain-text tables, readable in a terminal, a log and a mail."""

from __future__ import annotations

from collections.abc import Container, Sequence


def printable(text: str) -> str:
    """`text` with what would break a line or steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line: at most 200 characters of its first; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Container[int] = (0,), total: bool = False) -> str:
    """Columns two spaces apart; those in `left` flush left, the rest right. total: a rule before the last row."""
    rows = [[printable(cell) for cell in row] for row in rows]
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [text(row) for row in rows]
    if total and body:
        body.insert(-1, rule)
    return "\n".join([text(header), rule, *body])
