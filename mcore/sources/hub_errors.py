"""What the two hubs' clients raise, in one line, and what to do about it."""

from __future__ import annotations


def found_and_fix(error: Exception, what: str, spelling: str) -> tuple[str, str]:
    """An error in one line, and what to do. The clients have error trees of their own, over several network libraries.

    Args:
        error: What a client raised.
        what: `model` or `data set`.
        spelling: What to do if the hub does not know the name.
    """
    kind = type(error).__name__
    # A LocalEntryNotFoundError is what remains of a network error after a look into the cache.
    if ("NotFound" in kind or "NotExist" in kind) and "Local" not in kind:
        fix = spelling
    elif "Gated" in kind or "Unauthorized" in kind:
        fix = f"Ask for access on the {what}'s page, and log in to the hub."
    else:
        fix = f"Check the network and the proxy, or fetch the {what} elsewhere and name its folder."
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{kind}: {first_line}", fix
