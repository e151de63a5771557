"""The token for a hub, which is in no parameter: of a Prefect Secret block, or of the environment."""

from __future__ import annotations

import os

from configs.schema.promote import TOKEN_VARIABLES
from mcore.errors import InfrastructureError, Problem


def token_variable(to: str) -> str:
    """The environment variable that a hub's client reads: `to` is `hf:org/name` or `ms:org/name`."""
    return TOKEN_VARIABLES[to[:2]]


def token_place(to: str, block: str | None) -> str:
    """Where the token is looked up, for people."""
    return f"the environment variable {token_variable(to)}" if block is None else f"the Prefect Secret block {block}"


def hub_token(to: str, block: str | None) -> str:
    """The token; empty if there is none.

    Args:
        to: The repository, `hf:org/name` or `ms:org/name`.
        block: Name of the Prefect Secret block; the environment counts if None.

    Raises:
        InfrastructureError: The server that has the block can't be reached.
    """
    if block is None:
        return os.environ.get(token_variable(to), "")
    import httpx
    from prefect.blocks.system import Secret  # more than a second that the environment need not wait for

    try:
        return str(Secret.load(block).get())  # type: ignore[union-attr]
    except ValueError:  # no such block
        return ""
    except (httpx.HTTPError, OSError, RuntimeError) as exc:
        problem = Problem(token_place(to, block), found=f"{type(exc).__name__}: {exc}")
        raise InfrastructureError("the token can't be looked up", [problem]) from exc
