"""Whatever is sent, the answer is one of OpenAI's, or an error in its shape; and the engine lives."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from kivi_jax.serve.app import create_app
from kivi_jax.serve.schema import ChatRequest, TextRequest
from kivi_jax.serve.service import Service
from tests.tokenizers import VOCAB

KINDS = {"/v1/chat/completions": ChatRequest, "/v1/completions": TextRequest}
TEXT = st.text(max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NUMBER = st.floats(-3, 3) | st.integers(-3, 3)
TOKENS = st.lists(st.integers(-1, VOCAB), max_size=5)
CALLS = st.lists(st.fixed_dictionaries({"id": TEXT, "type": st.just("function"), "function": ANYTHING}))
CONTENT = TEXT | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "file"]), "text": TEXT}))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "robot"])},
    optional={"content": CONTENT, "name": TEXT, "tool_calls": CALLS, "tool_call_id": TEXT},
)
LIKELY = {  # of what fields may be; most others mean nothing to them
    "model": st.just("tiny"),
    "messages": st.lists(MESSAGE, max_size=3),
    "prompt": TEXT | st.lists(TEXT, max_size=3) | TOKENS | st.lists(TOKENS, max_size=3),
    "n": st.integers(-1, 3),
    "seed": st.integers(),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.dictionaries(
        st.sampled_from(["include_usage", "continuous_usage_stats"]), st.booleans()
    ),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "logit_bias": st.dictionaries(st.integers(-1, VOCAB).map(str) | TEXT, NUMBER, max_size=2),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
}
# The server's threads draw random numbers meanwhile, which Hypothesis takes for a strategy's.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
FEW = st.integers(-1, 3) | st.sampled_from([10**6, 10**20, 1.5, "1"])  # an answer takes its time


@pytest.fixture(scope="module")
def http(engine):
    service = Service(engine, name="tiny", fingerprint="fp_0", timeout=60.0)
    with TestClient(create_app(service, most_bytes=4096)) as client:
        yield client
        asked = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
        assert client.post("/v1/completions", json=asked).status_code == 200
    stats = engine.stats()
    assert (stats.healthy, stats.running, stats.queued) == (True, 0, 0)


@st.composite
def bodies(draw, path):
    """Mostly what the schema has, mostly with values that it may have; then perhaps broken as bytes."""
    kind = KINDS[path]
    rare = st.integers(0, 9).map(lambda number: number == 0)
    body = {"model": "tiny", "max_tokens": draw(FEW)}
    needed = "messages" if kind is ChatRequest else "prompt"
    names = draw(st.lists(st.sampled_from(sorted(kind.known)), max_size=5, unique=True))
    for name in [*([] if draw(rare) else [needed]), *names]:
        if name not in ("max_tokens", "max_completion_tokens"):
            body[name] = draw(ANYTHING if draw(rare) else LIKELY.get(name, ANYTHING))
    data = json.dumps(body).encode()
    if draw(rare):
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return data


def check(http, path, data):
    response = http.post(path, content=data, headers={"Content-Type": "application/json"})
    if response.status_code != 200:
        assert response.status_code in (400, 404, 413, 422)
        assert response.json()["error"]["message"]
    elif response.headers["content-type"] == "application/json":
        found = response.json()
        assert found["usage"]["completion_tokens"] <= 3 * max(len(found["choices"]), 1)
    else:
        assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_breaks_the_server(http, path, data):
    check(http, path, data.draw(bodies(path)))


@pytest.mark.slow
@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_none_of_many_bodies_breaks_the_server(http, path, data):
    check(http, path, data.draw(bodies(path)))
