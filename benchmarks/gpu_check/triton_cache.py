"""A cache of Triton's that has been moved: it names in full where its files lay when they were written."""

from __future__ import annotations

import json
from pathlib import Path


def relocate(cache: Path) -> int:
    """Corrects the places that a moved ``TRITON_CACHE_DIR`` names, or every kernel in it would be compiled again.

    Args:
        cache: the folder, where it lies now.

    Returns:
        Number of kernels that it holds.
    """
    groups = sorted(cache.glob("*/__grp__*.json"))
    for group in groups:
        content = json.loads(group.read_text(encoding="utf-8"))
        paths = content["child_paths"]
        if isinstance(paths, dict):  # later releases may keep the names alone
            # what the kit left out is no longer named: 3.9 takes a group for lost where one of its files is
            here = {name: group.parent.resolve() / name for name in paths}
            content["child_paths"] = {name: str(path) for name, path in here.items() if path.is_file()}
            group.write_text(json.dumps(content), encoding="utf-8")
    return len(groups)
