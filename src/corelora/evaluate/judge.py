"""A judge behind any OpenAI-compatible endpoint: asked with retries, cached by request, its verdicts read by rule.

Nothing is sent anywhere unless an endpoint is named in the environment: CORELORA_JUDGE_URL (base URL, such as
http://localhost:8000/v1), CORELORA_JUDGE_MODEL, and CORELORA_JUDGE_KEY where it wants one. The `openai` package talks
to it: it waits and tries again on rate limits, server errors and dropped connections.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corelora.data.cache import key_of
from corelora.errors import CoreLoraError

URL, MODEL, KEY = "CORELORA_JUDGE_URL", "CORELORA_JUDGE_MODEL", "CORELORA_JUDGE_KEY"
ASKED_AGAIN = 3  # times, where a reply holds no verdict


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is.

    Attributes:
        url: base URL of the API.
        model: name that the endpoint knows.
        key: sent as the bearer token.
        retries: of a request that failed on its way.
    """

    url: str
    model: str
    key: str = "none"
    retries: int = 8


def endpoint_of(environment: Mapping[str, str]) -> Endpoint | None:
    """The endpoint that the environment names, or None where it names none.

    Raises:
        CoreLoraError: a URL without a model, or the other way round.
    """
    url, model = environment.get(URL), environment.get(MODEL)
    if not url and not model:
        return None
    if not url or not model:
        raise CoreLoraError(f"a judge needs both {URL} and {MODEL}; {URL if not url else MODEL} is not set")
    return Endpoint(url, model, environment.get(KEY) or "none")


class Judge:
    """Asks an endpoint; what it has answered is kept in a file and not asked for again.

    Args:
        endpoint: where.
        cache: a file of JSON lines, one a request.
    """

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        from openai import OpenAI

        self.endpoint, self.cache = endpoint, cache
        self.client = OpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=endpoint.retries)
        self.known: dict[str, str] = {}
        cache.parent.mkdir(parents=True, exist_ok=True)
        for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that was being written when a run ended
            self.known[entry["key"]] = entry["reply"]

    def verdict(self, system: str, user: str, read: Callable[[str], Any]) -> tuple[Any, str]:
        """(verdict, the judge's whole reply); the verdict is None where it gave none in several tries.

        Args:
            system, user: the prompt.
            read: a reply to a verdict, or None.

        Raises:
            CoreLoraError: the endpoint can't be reached or refuses.
        """
        reply = ""
        for attempt in range(ASKED_AGAIN):
            reply = self._reply(system, user, attempt)
            found = read(reply)
            if found is not None:
                return found, reply
        return None, reply

    def _reply(self, system: str, user: str, attempt: int) -> str:
        key = key_of(self.endpoint.url, self.endpoint.model, system, user, attempt)
        if key not in self.known:
            self.known[key] = self._ask(system, user, attempt)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": self.known[key]}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self.known[key]

    def _ask(self, system: str, user: str, attempt: int) -> str:
        from openai import OpenAIError

        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        temperature = 0.0 if attempt == 0 else 0.7  # the same words again would bring the same reply again
        try:
            made = self.client.chat.completions.create(
                model=self.endpoint.model, messages=messages, temperature=temperature, max_tokens=2048
            )
        except OpenAIError as error:
            raise CoreLoraError(f"the judge at {self.endpoint.url} did not answer: {error}") from None
        return made.choices[0].message.content or ""


_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]|\[(\d+(?:\.\d+)?)\]")
_CHOICE = re.compile(r"\[\[([ABC])\]\]")


def read_rating(reply: str) -> float | None:
    """A rating of 1 to 10 in double (or single) brackets; the last one counts."""
    found = _RATING.findall(reply)
    value = float(found[-1][0] or found[-1][1]) if found else None
    return value if value is not None and 1 <= value <= 10 else None


def read_choice(reply: str) -> str | None:
    """A, B or C (a tie) in double brackets; the last one counts."""
    found = _CHOICE.findall(reply)
    return found[-1] if found else None
