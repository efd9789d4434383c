"""A real HTTP server that misbehaves as told: nothing is lost, nothing is asked twice, every reason is named."""

import json
import threading

import pytest

from http_backend import Backend, completion
from trl_dynamics.probing import server as server_module
from trl_dynamics.probing.cache import AnswerCache, answer_all
from trl_dynamics.probing.generate import Answer, Failure, Request, Sampling
from trl_dynamics.probing.server import OpenAIServer, ServerUnreachable


@pytest.fixture
def backend():
    backend = Backend()
    yield backend
    backend.stop()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(server_module.API_KEY_VARIABLE, raising=False)


def request(text, **sampling):
    return Request.of([{"role": "user", "content": text}], Sampling(**sampling))


def client(backend, **options):
    return OpenAIServer(backend.url, "some-model", **options)


def ask(generator, *texts):
    return {r.prompt[0]["content"]: outcome for r, outcome in generator.generate([request(text) for text in texts])}


def test_the_request_holds_all_that_determines_the_answer(backend):
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ("END",)}
    generator = client(backend, api_key="secret", options={"extra": 1})
    ((_, answer),) = generator.generate([request("hello", **sampling)])
    assert answer == Answer("HELLO", "stop")
    assert backend.bodies == [
        {
            "model": "some-model",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["END"],
            "extra": 1,
        }
    ]
    assert backend.headers[0]["Authorization"] == "Bearer secret"


def test_many_requests_are_under_way_at_a_time(backend):
    gate = threading.Barrier(4, timeout=20)

    def together(handler):
        gate.wait()
        return completion("done")

    backend.scripts = {f"r{i}": [together] for i in range(8)}
    assert set(ask(client(backend, concurrency=4), *backend.scripts).values()) == {Answer("done")}
    assert backend.most_under_way == 4


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, "oops"),
        (503, {}, json.dumps({"error": {"message": "loading"}})),
        (429, {"Retry-After": "0"}, "slow down"),
        (200, {}, "<html>a proxy's page</html>"),
        (200, {}, '{"choices": [{"mess'),
        (200, {}, '{"choices": []}'),
        (200, {}, "null"),
        (200, {}, '{"choices": [{"message": {"content": 5}}]}'),
        (200, {}, '{"choices": [{"message": "text"}]}'),
        lambda handler: handler.connection.close(),
    ],
    ids=["500", "503", "429", "html", "torn", "no choices", "null", "number", "text", "hang-up"],
)
def test_what_may_pass_is_tried_again(backend, bad):
    backend.scripts = {"a": [bad, bad, completion("fine")]}
    assert ask(client(backend), "a") == {"a": Answer("fine")}
    assert backend.asked["a"] == 3


def test_attempts_are_counted_and_the_last_reason_is_told(backend):
    backend.scripts = {"a": [(500, {}, json.dumps({"detail": "no memory"}))], "b": [(200, {}, "nonsense")]}
    found = ask(client(backend, max_retries=2), "a", "b", "c")
    assert found["a"] == Failure("status 500: no memory, 3 attempts")
    assert "not a chat completion: b'nonsense'" in found["b"].reason
    assert found["c"] == Answer("C")
    assert backend.asked == {"a": 3, "b": 3, "c": 1}


def test_an_invalid_request_is_a_failure_at_once(backend):
    backend.scripts = {"long": [(400, {}, json.dumps({"error": {"message": "too many tokens"}}))]}
    assert ask(client(backend), "long", "short") == {
        "long": Failure("status 400: too many tokens"),
        "short": Answer("SHORT"),
    }
    assert backend.asked["long"] == 1


def test_a_time_out_is_tried_again_and_then_a_failure(backend):
    done = threading.Event()
    backend.scripts = {"slow": [lambda handler: done.wait(20) and None]}
    found = ask(client(backend, timeout=0.2, max_retries=1), "slow", "fast")
    done.set()
    assert found == {"slow": Failure("no answer within 0.2 s, 2 attempts"), "fast": Answer("FAST")}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion(None, refusal="I cannot"), Answer("I cannot", "refusal")),
        (completion("", "content_filter"), Answer("", "refusal")),
        (completion("cut", "length"), Answer("cut", "length")),
        (completion(None), Answer("", "stop")),
    ],
)
def test_refusals_cuts_and_empty_answers_are_answers(backend, reply, expected):
    backend.scripts = {"a": [reply]}
    assert ask(client(backend), "a") == {"a": expected}


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "set OPENAI_API_KEY"), (403, "set OPENAI_API_KEY"), (404, "the model's name 'some-m")]
)
def test_what_concerns_every_request_stops_the_work_with_a_remedy(backend, status, remedy):
    backend.scripts = {f"r{i}": [(status, {}, json.dumps({"error": {"message": "no such thing"}}))] for i in range(50)}
    with pytest.raises(ServerUnreachable, match=remedy) as error:
        ask(client(backend, concurrency=2), *backend.scripts)
    assert "no such thing" in str(error.value)
    assert sum(backend.asked.values()) <= 4, "the others are not even asked"


def test_a_server_that_dies_loses_no_answer(backend, tmp_path):
    """About half of the requests are answered; then every connection is refused, and a new server takes over."""
    count, requests = 40, [request(f"r{i}") for i in range(40)]

    def die(handler):
        threading.Thread(target=backend.stop).start()
        handler.connection.close()

    backend.scripts = {f"r{count // 2}": [die]}
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache, pytest.raises(ServerUnreachable, match="cannot be reached.*run again"):
        answer_all(client(backend, concurrency=4, max_retries=1), requests, cache)
    answered = {body["messages"][0]["content"] for body in backend.bodies} - {f"r{count // 2}"}
    kept = len(path.read_text().splitlines())
    # The server may die before it has answered the other three that are under way.
    assert count // 2 - 3 <= kept <= len(answered) < count

    second = Backend()
    with AnswerCache(path) as cache:
        found = answer_all(client(second), requests, cache)
    second.stop()
    assert found.num_cached == kept and found.num_generated == count - kept
    assert len(second.bodies) == count - kept
    assert not found.failures and {a.text for a in found.answers.values()} == {f"R{i}" for i in range(count)}


def test_the_rate_limit_spaces_all_attempts(backend):
    backend.scripts = {"a": [(500, {}, ""), completion("fine")]}
    ask(client(backend, requests_per_minute=60 / 0.05), "a", "b", "c", "d")
    times = sorted(backend.times)
    # Sleeping may end a little early on some clocks.
    assert len(times) == 5 and times[-1] - times[0] >= 0.9 * 4 * 0.05


def test_retry_after_is_honoured(backend):
    backend.scripts = {"a": [(429, {"Retry-After": "0.3"}, ""), completion("fine")]}
    ask(client(backend), "a")
    assert backend.times[1] - backend.times[0] >= 0.27


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2015 07:28:00 GMT", "nonsense", ""])
def test_any_retry_after_is_understood_or_ignored(backend, value):
    backend.scripts = {"a": [(429, {"Retry-After": value}, ""), completion("fine")]}
    assert ask(client(backend), "a") == {"a": Answer("fine")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "http://"),
        ({"model": ""}, "--rephraser_model"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"timeout": 0}, "timeout 0"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OpenAIServer(**({"base_url": "http://localhost", "model": "m"} | options))


def test_an_interruption_keeps_what_is_under_way(backend, tmp_path, monkeypatch):
    """The first Ctrl-C asks nothing more and waits for the answers that are being written."""
    interrupted, real_wait = threading.Event(), server_module.wait

    def wait(running, return_when):
        if not interrupted.is_set() and len(backend.bodies) >= 4:
            interrupted.set()
            raise KeyboardInterrupt
        return real_wait(running, timeout=0.05, return_when=return_when)

    def slow(handler):
        interrupted.wait(20)
        return completion("late")

    backend.scripts = {f"r{i}": [slow] for i in range(9)}
    monkeypatch.setattr(server_module, "wait", wait)
    requests = [request(text) for text in backend.scripts]
    with AnswerCache(tmp_path / "c") as cache, pytest.raises(KeyboardInterrupt):
        answer_all(client(backend, concurrency=4), requests, cache)
    assert sum(backend.asked.values()) == len((tmp_path / "c").read_text().splitlines()) == 4
