"""Descriptions c2 for a user's own list of names: from a template, or from any OpenAI-compatible endpoint.

Step name -> c2 (paper sec. 4.1, appendix A). Never required: whoever writes the column by hand needs nothing of this.
What an endpoint says is kept, one line a name, in a table that a person looks over before anything is made of it. Names
leave this machine only for the address that the user gave.
"""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.cast import CastMember, read_cast, write_cast
from apl_train.datasets.dataset import _given_away

REQUEST = (
    "Here is a list of famous individuals. Using your knowledge, please generate a concise, one-sentence description "
    "for each person that includes their gender, ethnicity, profession, and notable facial features. For instance, for "
    'the name Albert Einstein, you would provide: "A male, German-born physicist with a bushy mustache and unkempt '
    'hair." {names}'
)
"""The paper's own request (appendix A)."""
_FORM = "\nAnswer with one line for each person and nothing else, in the form NAME: DESCRIPTION, no name in the latter."
_BATCH = 10
_TIMEOUT = 120
_log = logging.getLogger("apl.describe")


def template(gender: str, race: str, occupation: str, attributes: str) -> str:
    """The paper's prompt (sec. 3.4): A [gender] [race] [occupation], [facial attributes]."""
    head = " ".join(part.strip() for part in (gender, race, occupation) if part.strip())
    return f"A {head}, {attributes.strip().rstrip('.')}" if attributes.strip() else f"A {head}"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: `url` ends before /chat/completions; the key comes from APL_API_KEY alone."""

    url: str
    model: str

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ConfigError(f"endpoint is {self.url!r}, not an address.", "Write it like http://127.0.0.1:8080/v1",
                              field="endpoint")
        if not self.model:
            raise ConfigError("The endpoint has no model.", "Name one that the server offers, with --describe-model.",
                              field="describe_model")

    def ask(self, text: str) -> str:
        """The answer to one message. Raises DatasetError when there is none."""
        body = json.dumps({"model": self.model, "temperature": 0,
                           "messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("APL_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        hint = "Check address, model and APL_API_KEY; or write the descriptions by hand."
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                found = json.loads(answer.read(2**20))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise DatasetError(f"{self.url} answered {error.code} {error.reason}.", hint, field="endpoint") from error
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.url} cannot be asked: {error}.", hint, field="endpoint") from error
        except (KeyError, IndexError, TypeError) as error:
            raise DatasetError(f"{self.url} did not answer as OpenAI's interface does.", hint,
                               field="endpoint") from error
        return str(found)


def parse(answer: str, names: Sequence[str]) -> dict[str, str]:
    """Name to description from an answer's lines "NAME: DESCRIPTION"; numbers, bullets and quotes are taken off."""
    wanted = {" ".join(name.casefold().split()): name for name in names}
    found = {}
    for line in answer.splitlines():
        head, colon, text = re.sub(r"^\s*(?:[-*•]|\d+[.)])?\s*", "", line).partition(":")
        name = wanted.get(" ".join(head.casefold().replace("*", "").replace('"', "").split()))
        text = text.replace("**", "").strip().strip('"').strip().rstrip(".")
        if colon and name and text and not _given_away(name, text):
            found[name] = text
    return found


def draft(people: Sequence[CastMember], endpoint: Endpoint | None, drafts: Path,
          progress: Callable[[int, int], None] | None = None) -> list[CastMember]:
    """Persons with descriptions: their own, those of the table `drafts`, or new ones, which are added to that table.

    Args:
        endpoint: who is asked; None: the template, from gender, race, occupation and attributes.
        drafts: keeps what was found, also when this is interrupted.

    Raises:
        DatasetError: the endpoint fails, or somebody is left without a description; what was found is kept.
    """
    known = {p.name: p.description for p in read_cast(drafts, descriptions=False)} if drafts.exists() else {}
    found = {p.name: p.description or known.get(p.name, "") for p in people}
    missing = [p for p in people if not found[p.name]]

    def keep() -> list[CastMember]:
        done = [replace(p, description=found[p.name]) for p in people]
        write_cast(drafts, done)
        return done

    if endpoint is None:
        found |= {p.name: template(p.gender, p.race, p.occupation, p.attributes) for p in missing
                  if p.gender and p.occupation}
    for start in range(0, len(missing) if endpoint else 0, _BATCH):
        names = [p.name for p in missing[start : start + _BATCH]]
        try:
            found |= parse(endpoint.ask(REQUEST.format(names=", ".join(names)) + _FORM), names)
        finally:
            keep()
        if progress:
            progress(min(start + _BATCH, len(missing)), len(missing))
    done = keep()
    left = [p.name for p in done if not p.description]
    if left:
        way = ("Run the same command again to ask once more, or fill them in there by hand." if endpoint else
               "Fill in gender and occupation (race and attributes too) for the template, or the description itself.")
        raise DatasetError(f"{len(left)} persons have no description in {drafts}, {left[0]} first.", way,
                           field="description")
    return done
