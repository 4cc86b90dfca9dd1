"""The layouts of data sets that can be read. To add one, write a module with a `Layout` and list it here.

Layouts are tried in this order where none is named: a folder of LanGuideMedSeg's layout may have sub-folders with
LViT's names, and a manifest is any folder with a table.
"""

from __future__ import annotations

from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.biomedparse import BIOMEDPARSE
from ntpseg.data.layouts.languide import LANGUIDE
from ntpseg.data.layouts.lvit import LVIT
from ntpseg.data.layouts.manifest import MANIFEST
from ntpseg.data.layouts.medvlsm import MEDVLSM
from ntpseg.data.layouts.packed import PACKED_SET

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (PACKED_SET, LANGUIDE, LVIT, BIOMEDPARSE, MEDVLSM, MANIFEST)
}
LAYOUT_NAMES = (*LAYOUTS, "auto")

__all__ = ["LAYOUTS", "LAYOUT_NAMES", "Layout", "Listing"]
