"""Errors that a user can mend. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 12  # a terminal's worth: timm alone has hundreds of names


class UserError(ValueError):
    """What was given, what was expected, what to do: in that order, in one or a few sentences."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest names that do.

    >>> str(unknown("protocol", "knm", ["knn", "linear"]))
    "unknown protocol 'knm'; did you mean 'knn'? Known: knn, linear"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return UserError(f"unknown {kind} {given!r}{hint} Known: {', '.join(names[:_LISTED]) or 'none'}{more}")
