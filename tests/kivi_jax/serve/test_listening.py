"""The server on a real socket: clients that leave, an end that waits for answers, a port that is taken."""

import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from kivi_jax.serve.app import create_app
from kivi_jax.serve.listening import listen

LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "n": 16, "temperature": 1.5}


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(engine, service, serving, stream):
    """More rows than slots, so that some wait when it leaves."""
    _, address = serving(create_app(service))
    before = engine.stats().finished.get("cancelled", 0)
    with httpx2.Client(base_url=address) as http:
        body = LONG | {"stream": stream}
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.02)
        until(lambda: engine.stats().finished.get("cancelled", 0) > before)
        until(lambda: engine.stats().running + engine.stats().queued + engine.stats().reading == 0)
        assert http.get("/health").status_code == 200


def test_the_end_waits_for_answers(openai, service, serving):
    server, address = serving(create_app(service))
    client = openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0)
    stream = client.completions.create(**LONG, stream=True)
    first = next(iter(stream))
    server.should_exit = True
    reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert first.choices[0].finish_reason is None
    assert len([reason for reason in reasons if reason]) == 16
    until(lambda: not server.started or not server.servers[0].is_serving())


def test_many_clients_at_once_get_their_own_answers(openai, service, serving):
    _, address = serving(create_app(service))
    client = openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0)
    texts = [f"what is {number}" for number in range(6)]
    ask = dict(model="tiny", max_tokens=12, temperature=0)
    alone = [client.completions.create(prompt=text, **ask).choices[0].text for text in texts]
    found = {}

    def work(text):
        found[text] = client.completions.create(prompt=text, **ask).choices[0].text

    threads = [threading.Thread(target=work, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in texts] == alone


def test_a_port_that_is_taken_or_a_host_that_is_none_is_one_line():
    with listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"127.0.0.1:{port} cannot be listened on \(.*\): choose another"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"nowhere.invalid:1 cannot be listened on"):
        listen("nowhere.invalid", 1)


@pytest.mark.slow
def test_sigterm_drains_the_command(openai):
    arguments = ["serve", "demo", "--slots", "2", "--context", "128", "--port", "0", "--cache", "full"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kivi_jax", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if "http://" in line)
        address = next(word for word in line.split() if word.startswith("http://"))
        client = openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0)
        stream = client.completions.create(
            model="demo", prompt="Copy: moon", max_tokens=100, n=8, temperature=1.0, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        assert len([reason for reason in reasons if reason]) == 8
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
