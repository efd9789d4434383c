"""Rephrases by a real `transformers serve` with the embedded model, killed half-way and started again."""

import threading

import pytest

from trl_dynamics import embedded
from trl_dynamics.probing.build import build
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.generate import Sampling
from trl_dynamics.probing.generated import Generation
from trl_dynamics.probing.rephrase import REPHRASES, GeneratedRephraser
from trl_dynamics.probing.server import OpenAIServer

NUM_PROMPTS = 50
TYPES = [name for name, kind in REPHRASES.items() if not kind.by_itself]
REQUESTS = NUM_PROMPTS * len(TYPES)


def rebuild(url, path, rows, on_answer=None):
    """Build over the server with the cache at `path`; returns the metadata on rephrases."""
    client = OpenAIServer(f"{url}/v1", embedded.model_path(), concurrency=4, timeout=60, max_retries=1)
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    with AnswerCache(path) as cache:
        generation = Generation(
            rephraser=GeneratedRephraser(client, sampling), cache=cache, attempts=1, progress=on_answer
        )
        built = build(rows, types=["rejected", *TYPES], num_probes=NUM_PROMPTS, generation=generation)
    return built


def test_a_killed_server_costs_no_answer_twice(serve, tmp_path):
    rows, path = embedded.preference_rows(NUM_PROMPTS), tmp_path / "answers.jsonl"
    server = serve()

    def kill_half_way(done, total):
        assert total == REQUESTS
        if done == REQUESTS // 2:
            threading.Thread(target=server.kill).start()

    with pytest.raises(ValueError, match="cannot be reached|got no answer"):
        rebuild(server.url, path, rows, kill_half_way)
    kept = path.read_text().splitlines()
    assert REQUESTS // 2 <= len(kept) < REQUESTS

    built = rebuild(serve().url, path, rows)
    (about,) = built.probe_set.metadata["rephrases"]
    assert (about["from_cache"], about["generated"]) == (len(kept), REQUESTS - len(kept))
    lines = path.read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == REQUESTS
    made = sum(built.probe_set.counts.get(name, 0) for name in TYPES)
    assert made + len(built.rejected) == REQUESTS, "every answer is kept or listed with its reason"

    started_nothing = rebuild("http://127.0.0.1:9", path, rows)
    assert started_nothing.probe_set.fingerprint == built.probe_set.fingerprint
    assert started_nothing.probe_set.metadata["rephrases"][0]["from_cache"] == REQUESTS


def test_an_unknown_model_stops_the_build_with_a_remedy(serve, tmp_path):
    client = OpenAIServer(f"{serve().url}/v1", "nobody/nothing", max_retries=0, timeout=60)
    generation = Generation(rephraser=GeneratedRephraser(client))
    with pytest.raises(ValueError, match="nobody/nothing"):
        build(embedded.preference_rows(2), types=["rejected", *TYPES], num_probes=2, generation=generation)
