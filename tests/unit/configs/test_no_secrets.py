"""A run is stored, shown and compared, so no field of it may be there for a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from configs.schema.run import RunConfig

FOR_A_SECRET = re.compile(r"(token|password|passwd|secret|api_?key|access_?key|credentials?)$", re.IGNORECASE)
NAMES_ONE = {"push_secret"}
"""The name of a Prefect block, not what is in it."""


def fields(schema: dict[str, Any]) -> Iterator[str]:
    for group in (schema, *schema["$defs"].values()):
        yield from group.get("properties", {})


def test_no_field_of_a_run_takes_a_secret() -> None:
    names = list(fields(RunConfig.model_json_schema()))
    assert len(names) > 100
    assert {"max_tokens", "max_prompt_tokens"} < set(names)  # counts end in the plural
    assert [name for name in names if FOR_A_SECRET.search(name) and name not in NAMES_ONE] == []
