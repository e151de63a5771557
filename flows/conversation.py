"""A conversation with a server of OpenAI's protocol: turns are kept, answers come as they are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from flows.served_model import OPENER, request
from mcore.errors import ConfigError, InfrastructureError, Problem

ANSWER_S = 600.0
"""Seconds without a sign of a server, after which it is given up."""


@dataclass
class Conversation:
    """What was said so far, with whom.

    Attributes:
        url: The server, without `/v1`.
        model: Name that the server has for the model.
        key: What the server wants to be shown.
        system: The system message; without it the chat template's own default stands.
        max_tokens: Tokens: the longest answer.
        temperature: 0 for the most probable tokens.
        messages: What was said.
    """

    url: str
    model: str
    key: str | None = None
    system: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer as they come. What came before the reader left off is what was said.

        Raises:
            ConfigError: The server does not take the question.
            InfrastructureError: The server is gone.
        """
        said = [{"role": "user", "content": text}]
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {
            "model": self.model,
            "messages": [*before, *self.messages, *said],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
        }
        answer = ""
        try:
            for piece in _pieces(self.url, self.key, body):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages += [*said, {"role": "assistant", "content": answer}]


def served_models(url: str, key: str | None) -> list[str]:
    """Names of the models that a server has.

    Raises:
        InfrastructureError: There is no such server.
        ConfigError: It does not answer as one.
    """
    try:
        with OPENER.open(request(f"{url}/v1/models", key), timeout=10) as response:
            return [str(model["id"]) for model in json.load(response)["data"]]
    except HTTPError as exc:
        raise ConfigError("the server can't be used", [Problem(url, found=_reason(exc))]) from exc
    except (URLError, OSError, HTTPException) as exc:
        raise InfrastructureError("the server can't be reached", [Problem(url, found=str(exc))]) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError("the server can't be used", [Problem(url, "a list of models", repr(exc))]) from exc


def _pieces(url: str, key: str | None, body: dict[str, Any]) -> Iterator[str]:
    try:
        asked = request(f"{url}/v1/chat/completions", key, json.dumps(body).encode())
        with OPENER.open(asked, timeout=ANSWER_S) as response:
            for line in response:
                event = line.decode(errors="replace").strip()
                if not event.startswith("data:"):
                    continue
                data = event.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                found = json.loads(data)
                if "error" in found:
                    raise ConfigError("the server stopped", [Problem(url, found=str(found["error"]))])
                for choice in found.get("choices", ()):
                    if piece := choice.get("delta", {}).get("content"):
                        yield piece
    except HTTPError as exc:
        raise ConfigError("the server does not take the question", [Problem(url, found=_reason(exc))]) from exc
    except (URLError, OSError, HTTPException) as exc:
        raise InfrastructureError("the server is gone", [Problem(url, found=str(exc))]) from exc


def _reason(error: HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return f"{error.code}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {text[:500]}"
