"""OpenAI's own client against the server: what it asks is answered as `complete` answers, alone."""

import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import kivi_jax as kj
from kivi_jax.cache.names import parse_cache
from kivi_jax.serve import prompts
from kivi_jax.serve.app import create_app
from kivi_jax.serve.schema import WITHOUT_EFFECT, ChatRequest, TextRequest
from kivi_jax.serve.service import Service
from tests.tokenizers import build

from .conftest import CACHE, CONTEXT

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = dict(model="tiny", temperature=0)


@pytest.fixture(scope="module")
def alone(engine):
    """What `completions` gives, one prompt at a time."""

    def ask(prompt, **options):
        options = dict(cache=CACHE, max_new_tokens=12) | options
        return kj.completions(engine.model, engine.tokenizer, [prompt], **options)[0]

    return ask


def test_a_chat_is_answered_as_complete_answers(client, alone):
    expected = alone(HELLO, log_probs=True)
    found = client.chat.completions.create(
        **GREEDY, messages=HELLO, max_completion_tokens=12, logprobs=True, top_logprobs=3
    )
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert (choice.message.role, found.object, found.model) == ("assistant", "chat.completion", "tiny")
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected.log_probs, abs=1e-4)
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert len(token.top_logprobs) == 3
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_chunks_are_the_answer_in_parts(client, alone):
    expected = alone(HELLO)
    stream = client.chat.completions.create(
        **GREEDY, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(chunk.id, chunk.created) for chunk in [*chunks, last]}) == 1
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


def test_choices_are_drawn_apart_and_again_with_one_seed(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=8, n=3, seed=5, temperature=1.5)
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 24
    alone = client.chat.completions.create(**asked | dict(n=1, seed=6))
    assert alone.choices[0].message.content == texts[1]
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts


def test_a_stop_string_across_tokens_and_chunks_is_left_out(client, alone):
    text = alone("hello").text
    stop = next(text[at : at + 3] for at in range(2, len(text)) if text.find(text[at : at + 3]) == at)
    expected = text[: text.index(stop)]
    found = client.completions.create(**GREEDY, prompt="hello", max_tokens=12, stop=[stop, "never there"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
    stream = client.completions.create(**GREEDY, prompt="hello", max_tokens=12, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_penalties_and_bias_reach_the_logits(client, alone):
    first = alone("hello").tokens[0]
    asked = GREEDY | dict(prompt="hello", max_tokens=6)
    banned = client.completions.create(**asked, logit_bias={str(first): -100}, logprobs=0)
    assert banned.choices[0].logprobs.tokens[0] != kj_text(client, asked)
    forced = client.completions.create(**asked, logit_bias={"70": 100}, logprobs=0).choices[0].logprobs
    assert len(set(forced.tokens)) == 1
    apart = client.completions.create(
        **asked, logit_bias={"70": 8, "71": 8, "72": 8}, presence_penalty=2, frequency_penalty=2, logprobs=0
    )
    assert len(set(apart.choices[0].logprobs.tokens)) > 1


def kj_text(client, asked):
    return client.completions.create(**asked | dict(max_tokens=1), logprobs=0).choices[0].logprobs.tokens[0]


def test_prompts_in_all_shapes_and_their_echo(client, engine, alone):
    texts = ["hello", "a garden"]
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    expected = [alone(text).text for text in texts]
    for prompt, wanted in [
        ("hello", expected[:1]),
        (texts, expected),
        (ids[0], expected[:1]),
        (ids, expected),
    ]:
        found = client.completions.create(**GREEDY, prompt=prompt, max_tokens=12)
        assert [choice.text for choice in found.choices] == wanted
    echoed = client.completions.create(**GREEDY, prompt=texts, max_tokens=12, echo=True)
    assert [choice.text for choice in echoed.choices] == [t + e for t, e in zip(texts, expected, strict=True)]
    parts = ["", ""]
    for chunk in client.completions.create(**GREEDY, prompt=texts, max_tokens=12, echo=True, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [choice.text for choice in echoed.choices]


def test_an_echo_has_the_prompts_log_probabilities(client, engine, alone):
    ids = engine.tokenizer("hello there")["input_ids"]
    found = client.completions.create(**GREEDY, prompt=ids, max_tokens=1, echo=True, logprobs=2)
    shown = found.choices[0].logprobs
    assert len(shown.tokens) == len(ids) + 1
    assert (shown.token_logprobs[0], shown.top_logprobs[0]) == (None, None)
    # The prompt's last token, as a continuation of what stands before it.
    before = alone(
        engine.tokenizer.decode(ids[:-1], skip_special_tokens=True), max_new_tokens=1, log_probs=True
    )
    assert max(shown.top_logprobs[-2].values()) == pytest.approx(before.log_probs[0], abs=1e-4)
    for value, top in zip(shown.token_logprobs[1:], shown.top_logprobs[1:], strict=True):
        assert value <= max(top.values())
        assert value in top.values()
    assert shown.text_offset == sorted(shown.text_offset)
    only = client.completions.create(**GREEDY, prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert only.logprobs.token_logprobs[1:] == pytest.approx(shown.token_logprobs[1:-1], abs=1e-5)
    assert (only.text, only.finish_reason) == ("hello there", "length")


def events(text):
    """The data of a stream of server-sent events, which must be nothing else."""
    assert re.fullmatch(r"(?:data: [^\n]+\n\n)+", text)
    return re.findall(r"data: (.+)", text)


@pytest.mark.parametrize(
    ("path", "asked"),
    [("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "hello"})],
)
def test_streams_are_server_sent_events(http, path, asked):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "max_tokens": 5, "stream": True, "stream_options": options} | asked
    response = http.post(path, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *data, done = events(response.text)
    assert done == "[DONE]"
    usages = [json.loads(part)["usage"] for part in data]
    assert all(usage["full_cache_bytes"] > usage["cache_bytes"] > 0 for usage in usages[:-1])
    counts = [usage["completion_tokens"] for usage in usages]
    assert (counts, counts[-1]) == (sorted(counts), 5)


def test_models_health_metrics_and_the_page(openai, client, http):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len, model.chat) == ("tiny", CONTEXT, True)
    assert parse_cache(model.cache) == parse_cache(CACHE)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    assert http.get("http://testserver/health").json() == {"status": "ok"}
    client.completions.create(**GREEDY, prompt="hello", max_tokens=2)
    families = text_string_to_metric_families(http.get("http://testserver/metrics").text)
    held = {sample.name: sample.value for family in families for sample in family.samples}
    assert held["kivi_slots"] == 4
    assert held["kivi_new_tokens_total"] >= 2
    assert held["kivi_full_cache_bytes"] > held["kivi_cache_bytes"] > 0
    assert held["kivi_request_seconds_count"] == 1
    page = http.get("http://testserver/")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text  # nothing is fetched from elsewhere
    assert "https://" not in page.text


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"messages": None}, 422, "messages: field required"),
        ({"messages": []}, 422, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 422, "messages.0.role: input should be 'system'"),
        ({"messages": [{"role": "user"}]}, 400, "a message is a dict of the strings role and content"),
        ({"model": "gpt-4o"}, 404, "there is no model 'gpt-4o', but 'tiny'"),
        ({"n": 0}, 422, "n: input should be greater than or equal to 1"),
        ({"temperature": "hot"}, 422, "temperature: input should be a valid number"),
        ({"logit_bias": {"a": 1}}, 422, "logit_bias: 'a' is no token id"),
        ({"logit_bias": {"100000": 1}}, 400, "100000"),
        ({"max_tokens": 1000}, 400, "context"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format of type 'json_object' is not"),
        ({"audio": {"voice": "x"}}, 400, "audio is not built: leave it out"),
        ({"temprature": 1}, 400, "there is no field 'temprature'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "template does not show tools"),
        ({"tool_choice": "required"}, 422, "tool_choice: input should be 'auto' or 'none'"),
        ({"messages": [{"role": "user", "content": "hello" * 1000}]}, 413, "more than 4,096 bytes"),
        ({"n": 128}, 429, "requests wait already"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_answered_is_refused_in_openais_shape(http, changes, status, message):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 100} | changes
    response = http.post("chat/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert ("retry-after" in response.headers) == (status == 429)


def test_bodies_that_are_no_requests_are_refused(http):
    for body, status, message in [
        (b"{", 400, "the body is no JSON"),
        (b"[1]", 400, "the body is no JSON object"),
        (b'{"model": "\\ud800"}', 400, "the body is no JSON"),
        (b'{"model": "tiny", "temperature": NaN}', 400, "the body is no JSON"),
        (b"[" * 4000, 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
    ]:
        response = http.post("completions", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, message in response.json()["error"]["message"]) == (status, True)
    assert http.post("completions", content=b"{}").status_code == 415
    assert http.get("completions").status_code == 405
    assert "nothing: Not Found" in http.get("nothing").json()["error"]["message"]


def test_the_key_guards_all_but_the_page_and_the_health(service):
    with TestClient(create_app(service, key="secret")) as http:
        for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert http.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert http.post("/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"
        assert (http.get("/").status_code, http.get("/health").status_code) == (200, 200)


def test_other_pages_may_ask_only_where_that_is_allowed(service):
    asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in [((), None), (["http://a.example"], "http://a.example")]:
        with TestClient(create_app(service, origins=origins)) as http:
            answer = http.options("/v1/completions", headers=asked)
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_time_that_is_over_cuts_an_answer_or_refuses_it(engine):
    service = Service(engine, name="tiny", fingerprint="fp_0", timeout=0.0)
    with TestClient(create_app(service)) as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 100})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "timeout")
        streamed = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True})
        assert "no slot was free in time" in events(streamed.text)[-1]


def test_tools_and_calls_are_shown_to_the_template(monkeypatch):
    tokenizer = build("bytes", "chatml")
    said = "{{ m.tool_calls[0].function.arguments.x if m.tool_calls else m.content }};"
    shown = "{{ tools | tojson if tools else '' }}{% for m in messages %}" + said + "{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", shown)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]
    request = ChatRequest.model_validate(dict(model="m", messages=messages, tools=[tool]))
    (ids,) = prompts.prompts_of(tokenizer, request)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == json.dumps([tool]) + "ab;3;4;"
    unasked = request.model_copy(update={"tool_choice": "none"})
    (ids,) = prompts.prompts_of(tokenizer, unasked)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab;3;4;"


@pytest.mark.parametrize("kind", [ChatRequest, TextRequest])
def test_every_field_of_openais_schema_is_read_or_without_effect_or_refused(kind):
    """A field that OpenAI adds is refused by its name; what has no effect, and what is read, OpenAI has."""
    assert kind.model_fields.keys() <= kind.known
    assert {"logit_bias", "seed", "stop", "n"} <= kind.known
    assert not WITHOUT_EFFECT & kind.model_fields.keys()
