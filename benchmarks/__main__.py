"""``python -m benchmarks``: what ``ntpseg bench`` runs."""

from __future__ import annotations

import sys

from benchmarks.command import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"ntpseg bench: {error}", file=sys.stderr)
        sys.exit(2)
