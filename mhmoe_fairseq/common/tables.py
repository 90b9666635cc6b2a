"""Markdown tables that also read well in a terminal, and numbers as people write them."""

from collections.abc import Mapping, Sequence

MISSING = "–"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def columns_table(columns: Mapping[str, Sequence[str]]) -> str:
    """The same from the columns' cells by their titles; a column without any value is left out."""
    kept = {title: cells for title, cells in columns.items() if set(cells) != {MISSING}}
    return markdown_table(list(kept), list(zip(*kept.values())))


def millions(value: float | None, digits: int = 2) -> str:
    """``360.84M``."""
    return MISSING if value is None else f"{value / 1e6:,.{digits}f}M"


def number(value: float | None, digits: int = 2) -> str:
    """``12.34``, or a dash for None."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """``90.7 %``."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def byte_size(size: float) -> str:
    """Bytes as people write them, in powers of ten: ``8.0 MB``, ``1.5 GB``, ``16.0 TB``."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} B"


def duration(seconds: float) -> str:
    """``1.2 s``, ``35.0 ms``, ``80.1 us``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds * 1e6:,.1f} us"
