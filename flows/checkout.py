"""The pull step of deployments: a flow run works in the checkout that its worker's environment was made from."""

from __future__ import annotations

import os
from pathlib import Path


def enter_checkout() -> dict[str, str]:
    """Make the checkout the working directory, so that a run's relative paths mean what they mean by hand.

    Prefect's own pull steps name a folder of the machine that deployed, or clone a repository. This one finds the code
    that is installed beside it, so a deployment can be used by any worker whose environment `make setup` made.
    """
    checkout = Path(__file__).parents[1]
    os.chdir(checkout)
    return {"directory": str(checkout)}
