"""What promotion needs before a run begins: the hub's token, or a push would fail at the very end."""

from __future__ import annotations

import os

from configs.schema.promote import TOKEN_VARIABLES, PromoteConfig
from mcore.errors import Problem


def promote_problems(promote: PromoteConfig | None) -> list[Problem]:
    """The token that is missing; one in a Prefect Secret block is looked up when it is needed."""
    if promote is None or promote.push is None or promote.push_secret is not None:
        return []
    variable = TOKEN_VARIABLES[promote.push[:2]]
    if os.environ.get(variable):
        return []
    fix = "Set it for the worker, or name a Prefect Secret block in promote.push_secret."
    return [Problem(f"promote.push: {promote.push}", f"the hub's token in {variable}", "none", fix)]
