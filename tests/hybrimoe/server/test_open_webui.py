"""What Open WebUI sends: written down from its routers openai.py, ollama.py and tasks.py (version 0.6)."""

import asyncio
import json

import pytest

HEADERS = {
    "Authorization": "Bearer sk-none", "X-OpenWebUI-User-Name": "Ada%20Lovelace", "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ada@example.org", "X-OpenWebUI-User-Role": "admin", "X-OpenWebUI-Chat-Id": "c-1",
}  # fmt: skip
TITLE = """### Task:
Generate a concise, 3-5 word title with an emoji summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: Good morning
ASSISTANT: Good morning!
</chat_history>"""
CHAT = {
    "stream": True,
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [{"type": "text", "text": "Good morning"}]},
    ],
    "stream_options": {"include_usage": True},
    "max_tokens": 8,
    "temperature": 0.7,
}
METADATA = {
    "user_id": "1", "chat_id": "c-1", "message_id": "m-1", "session_id": "s-1", "tool_ids": None, "files": None,
    "features": {"web_search": False}, "variables": {"{{USER_NAME}}": "Ada"}, "task": "title_generation",
    "task_body": {"model": "tiny", "messages": CHAT["messages"]},
}  # fmt: skip


@pytest.fixture
def webui(application, client):
    """`webui(method, path, body)` sends a request with Open WebUI's headers."""
    app, _ = application(max_reply_s=0.5)  # tasks set a length of 1,000 tokens, or none

    def send(method, path, body=None):
        async def run():
            async with client(app) as http:
                return await http.request(method, path, json=body, headers=HEADERS)

        return asyncio.run(run())

    return send


def test_the_list_of_models(webui):
    answer = webui("GET", "/v1/models").json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["tiny"]
    assert all(model["owned_by"] for model in answer["data"])


@pytest.mark.parametrize("more", [{}, {"metadata": METADATA, "chat_id": "c-1", "id": "m-1", "session_id": "s-1"}])
def test_a_chat_is_streamed_with_its_usage_at_the_end(webui, more):
    answer = webui("POST", "/v1/chat/completions", CHAT | more)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line and line[0] != ":"]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 8
    named = {one.split("'")[1] for one in answer.headers.get_list("warning")}
    assert named == set(more) - {"metadata"}, "what is left out is told"


@pytest.mark.parametrize(
    "body",
    [
        {"max_completion_tokens": 1000},  # titles
        {},  # tags, follow-ups, queries
        {"max_tokens": 1000},  # titles of models of an Ollama connection
    ],
)
def test_background_tasks_are_answered_whole(webui, body):
    head = {"model": "tiny", "messages": [{"role": "user", "content": TITLE}], "stream": False, "metadata": METADATA}
    answer = webui("POST", "/v1/chat/completions", head | body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_an_ollama_connection(webui):
    assert webui("GET", "/api/version").json()["version"]
    (listed,) = webui("GET", "/api/tags").json()["models"]
    assert {"name", "model", "modified_at", "size", "digest", "details"} <= listed.keys()
    assert webui("GET", "/api/ps").json()["models"][0]["expires_at"]
    assert webui("POST", "/api/show", {"model": "tiny:latest"}).json()["capabilities"]
    chat = {
        "model": "tiny:latest", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "keep_alive": "5m",
        "options": {"num_predict": 3, "num_ctx": 2048, "temperature": 0.7, "stop": ["never"]},
    }  # fmt: skip
    answer = webui("POST", "/api/chat", chat)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    pieces = [json.loads(line) for line in answer.text.splitlines()]
    assert pieces[-1]["done"]
    assert pieces[-1]["eval_count"] == 3
