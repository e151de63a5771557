"""A promoted model goes to a hub. The token comes by the environment and goes nowhere else: no argument, log or file.

Imports a hub's client, so it runs in a process of its own (`python -m mcore.registry push`).
"""

from __future__ import annotations

import os
from pathlib import Path

from configs.schema.promote import TOKEN_VARIABLES
from mcore.errors import ConfigError, InfrastructureError, Problem, SourceError
from mcore.registry.release import RELEASE, Release

REFUSED = ("Unauthorized", "Forbidden", "Gated", "Authentication", "NotFound", "NotExist", "Invalid", "BadRequest")
"""Parts of the names of errors by which hubs refuse, in both clients; all else may pass by itself."""


def push(folder: Path, to: str) -> str:
    """Upload a release: weights, config, tokenizer and card.

    A repository that is not there is made, private. What the hub has already is not sent again.

    Args:
        folder: The release.
        to: `hf:org/name` or `ms:org/name`.

    Returns:
        Where it can be seen.

    Raises:
        ConfigError: There is no token, or the folder is no release.
        SourceError: The hub refuses.
        InfrastructureError: The hub can't be reached.
    """
    hub, _, repo = to.partition(":")
    token = os.environ.get(TOKEN_VARIABLES[hub], "")
    problems = [] if token else [Problem(TOKEN_VARIABLES[hub], "the hub's token in the environment", "none")]
    folder = folder.resolve()  # the release, though the alias move meanwhile
    try:
        release = Release.read(folder)
    except ValueError as exc:
        problems.append(Problem(str(folder), "a release", str(exc)))
    if problems:
        raise ConfigError("nothing was pushed", problems)
    message = f"{release.artifact} {release.content[:12]}"
    try:
        return _push_hf(folder, repo, token, message) if hub == "hf" else _push_ms(folder, repo, token, message)
    except Exception as exc:  # two clients with error trees of their own, over several network libraries
        kind = type(exc).__name__
        first_line = (str(exc).strip().splitlines() or [""])[0].replace(token, "***")
        problem = Problem(to, found=f"{kind}: {first_line}")
        # Without the cause: its text may hold the request, and that the token.
        if any(part in kind for part in REFUSED) or getattr(getattr(exc, "response", None), "status_code", 500) < 500:
            raise SourceError("the hub refuses the model", [problem]) from None
        raise InfrastructureError("the model can't be pushed", [problem]) from None


def _push_hf(folder: Path, repo: str, token: str, message: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo, private=True, exist_ok=True)
    done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[RELEASE])
    return str(done.commit_url)


def _push_ms(folder: Path, repo: str, token: str, message: str) -> str:
    from modelscope.hub.api import HubApi

    api = HubApi(token=token)
    api.create_repo(repo, token=token, visibility="private", exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=str(folder), commit_message=message, ignore_patterns=[RELEASE], token=token,
        use_cache=False,  # its notes on what was sent would lie in the release
    )  # fmt: skip
    return f"ms:{repo}"
