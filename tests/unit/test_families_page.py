"""docs/families.md names every architecture that can be converted, under its family, and no other."""

import re
from pathlib import Path

from mcore.bridge.families import SUPPORTED

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_lists_what_is_supported():
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    listed = {name: family for family, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == dict(SUPPORTED)
