"""docs/megatron_swift.md is what the table says."""

from flows.from_swift import table
from flows.from_swift.page import PAGE, page


def test_the_page_is_made_of_the_table() -> None:
    assert PAGE.read_text() == page(), "run: python -m flows.from_swift.page"


def test_every_row_is_on_it() -> None:
    text = page()
    assert all(f"\n| `{row.name}`" in text for row in table.arguments())
