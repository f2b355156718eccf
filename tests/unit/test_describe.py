"""Descriptions: the paper's template, and drafts from a server that speaks OpenAI's interface, kept and looked over."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.cast import CastMember, read_cast
from apl_train.datasets.describe import Endpoint, draft, parse, template


@pytest.mark.parametrize(("parts", "expected"), [  # table A1 of the paper
    (("female", "American", "actor", "green eyes, vibrant smile"),
     "A female American actor, green eyes, vibrant smile"),
    (("male", "British", "soccer player", "blond hair, tattoos."), "A male British soccer player, blond hair, tattoos"),
    (("male", "", "farmer", ""), "A male farmer"),
])
def test_the_papers_template(parts: tuple[str, ...], expected: str) -> None:
    assert template(*parts) == expected


@pytest.mark.parametrize("line", [
    "Ada Hill: A female, British mathematician with dark hair.", '1. "Ada Hill": "A female, British mathematician with '
    'dark hair."', "- **Ada Hill**: A female, British mathematician with dark hair", "* ada  hill : A female, British "
    "mathematician with dark hair.",
])
def test_answers_in_the_forms_that_models_like(line: str) -> None:
    assert parse(f"Here you are:\n{line}\nBob: x", ["Ada Hill"]) == {
        "Ada Hill": "A female, British mathematician with dark hair"}


def test_an_answer_that_gives_the_person_away_is_none() -> None:
    assert parse("Ada Hill: Ada Hill is a woman\nBo: A man", ["Ada Hill", "Bo"]) == {"Bo": "A man"}


class Server:
    """Answers chat completions; `say` is what it answers with, for every request."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.say, self.status = "", 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                outer.headers.append(dict(self.headers))
                answer = json.dumps({"choices": [{"message": {"content": outer.say}}]}).encode()
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


PEOPLE = [CastMember("Ada Hill"), CastMember("Bo Lake", description="A man"), CastMember("Cy Wood")]


def test_a_server_is_asked_the_papers_question_about_those_without_a_description(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APL_API_KEY", "secret")
    server.say = "Ada Hill: A woman, dark hair\nCy Wood: A man, beard"
    drafts = tmp_path / "drafts.csv"
    found = draft(PEOPLE, Endpoint(server.url, "m"), drafts)
    assert [p.description for p in found] == ["A woman, dark hair", "A man", "A man, beard"]
    (request,) = server.requests
    (message,) = request["messages"]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "m"
    assert "Here is a list of famous individuals." in message["content"] and "bushy mustache" in message["content"]
    assert "Ada Hill, Cy Wood" in message["content"] and "Bo Lake" not in message["content"]
    assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in drafts.read_text()
    assert [p.description for p in read_cast(drafts)] == [p.description for p in found]
    # what somebody changed stays, and nothing is asked twice
    drafts.write_text(drafts.read_text().replace("dark hair", "red hair"))
    again = draft(PEOPLE, Endpoint(server.url, "m"), drafts)
    assert again[0].description == "A woman, red hair" and len(server.requests) == 1


def test_what_was_found_is_kept_when_somebody_is_left(server: Server, tmp_path: Path) -> None:
    server.say = "Ada Hill: A woman, dark hair"
    with pytest.raises(DatasetError, match=r"1 persons have no description .*Cy Wood first") as caught:
        draft(PEOPLE, Endpoint(server.url, "m"), tmp_path / "drafts.csv")
    assert "by hand" in caught.value.hint
    server.say = "Cy Wood: A man, beard"
    assert draft(PEOPLE, Endpoint(server.url, "m"), tmp_path / "drafts.csv")[0].description == "A woman, dark hair"
    assert "Ada Hill" not in server.requests[-1]["messages"][0]["content"]


def test_a_server_that_fails(server: Server, tmp_path: Path) -> None:
    server.status = 401
    with pytest.raises(DatasetError, match="answered 401") as caught:
        draft(PEOPLE, Endpoint(server.url, "m"), tmp_path / "drafts.csv")
    assert "APL_API_KEY" in caught.value.hint
    with pytest.raises(DatasetError, match="cannot be asked"):
        Endpoint("http://127.0.0.1:1/v1", "m").ask("x")


@pytest.mark.parametrize(("url", "model", "field"), [
    ("ftp://a", "m", "endpoint"), ("localhost", "m", "endpoint"), ("http://a/v1", "", "describe_model"),
])
def test_endpoints_that_are_none(url: str, model: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url, model)
    assert caught.value.field == field and caught.value.hint


def test_the_template_drafts_without_any_server(tmp_path: Path) -> None:
    people = [CastMember("Ada", gender="female", race="British", occupation="painter", attributes="dark hair")]
    assert draft(people, None, tmp_path / "d.csv")[0].description == "A female British painter, dark hair"
    with pytest.raises(DatasetError, match="Bo first") as caught:
        draft([*people, CastMember("Bo")], None, tmp_path / "d.csv")
    assert "gender and occupation" in caught.value.hint
