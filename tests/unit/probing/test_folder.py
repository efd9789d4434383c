"""A set's folder: complete or not there, with a card that tells the truth, and what its upload would send."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml
from huggingface_hub import DatasetCard, HfApi

from trl_dynamics.probing import card
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.schema import Probe, ProbeSet

ABOUT = {
    "source": "pairs.jsonl, split train",
    "license": "mit",
    "seed": 3,
    "select": "random",
    "num_rows": 9,
    "unusable_rows": {"a blank rejected": 2},
    "versions": {"python": "3.11"},
    "own_answers": {"model": "m@1", "types": ["greedy"], "max_new_tokens": 8, "cut_at_max_new_tokens": {"greedy": 1}},
    "rephrases": [{"by": "writer", "types": ["chosen_rephrase_semantic"], "prompts": {"semantic": "Say {text} anew"}}],
    "rejected": {"chosen_rephrase_semantic: empty": 4},
}


def probe_set(num=2, **metadata):
    responses = {"chosen": "a", "rejected": "b", "greedy": "c", "mine": "d", "sampled_1": "e"}
    return ProbeSet(tuple(Probe(str(i), "Why?", responses) for i in range(num)), "my set", ABOUT | metadata)


def write(folder, given=None, **options):
    given = given or probe_set()
    return probe_io.write_folder(given, folder, {"README.md": card.dataset_card(given)}, **options)


def test_the_card_tells_all_and_the_hub_can_read_it():
    text = card.dataset_card(probe_set())
    read = DatasetCard(text)
    assert read.data.license == "mit" and read.data.configs == [{"config_name": "default", "data_files": "data.jsonl"}]
    for fact in (
        "2 prompts with 5 types",
        "- Source: pairs.jsonl, split train",
        "- Licence: mit",
        "- Seed: 3",
        "a blank rejected: 2",
        "| `greedy` | in-distribution | the model's own free-running greedy answer | 2 |",
        "| `mine` | custom | given with the data | 2 |",
        "| `sampled_1` | in-distribution |",
        "`m@1` wrote `greedy`, at most 8 new tokens each. Cut there: greedy: 1.",
        "`writer` wrote `chosen_rephrase_semantic`",
        "Say {text} anew",
        "chosen_rephrase_semantic: empty: 4",
        probe_set().fingerprint,
    ):
        assert fact in text, fact
    bare = card.dataset_card(ProbeSet(probe_set().probes))
    assert "unknown: that of the source applies" in bare and "None" not in bare


def test_versions_are_of_what_is_installed():
    assert {"python", "trl", "torch", "transformers", "datasets"} <= set(card.versions())


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    folder = write(tmp_path / "deep" / "set")
    before = (folder / "data.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a probe set already; pass --overwrite"):
        write(folder, probe_set(5))
    assert (folder / "data.jsonl").read_bytes() == before
    write(folder, probe_set(5), overwrite=True)
    assert len(probe_io.load(folder)) == 5
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is no probe set"):
            write(other, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "other"]
    assert [p.name for p in folder.parent.iterdir()] == ["set"] and [p.name for p in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, error, existing):
    folder = tmp_path / "set"
    if existing:
        write(folder)

    def fail(given, part):
        (part / "data.jsonl").write_text("half")
        raise error

    monkeypatch.setattr(probe_io, "save", fail)
    with pytest.raises((ValueError, KeyboardInterrupt, RuntimeError)) as caught:
        write(folder, probe_set(5), overwrite=True)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == (["set"] if existing else [])
    assert not existing or len(probe_io.load(folder)) == 2


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback that answers every request with one status; returns its log and how to set the status."""
    seen, reply = [], {"status": 401}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, self.path))
            body = json.dumps({"error": "told so"}).encode()
            self.send_response(reply["status"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: HfApi(endpoint=address, **options))
    yield seen, reply
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "hf auth login"), (403, "write role"), (404, "no such user"), (418, "try again later")],
)
def test_what_the_hub_refuses_comes_with_a_remedy(tmp_path, hub, status, remedy):
    seen, reply = hub
    reply["status"] = status
    with pytest.raises(ValueError, match=rf"refused to take 'someone/probes' \(status {status}\): .*{remedy}"):
        probe_io.push(write(tmp_path / "set"), "someone/probes", token="hf_x")
    assert seen[0] == ("POST", "/api/repos/create")


def test_without_a_network(tmp_path, monkeypatch):
    folder = write(tmp_path / "set")
    with pytest.raises(ValueError, match="switched off here .HF_HUB_OFFLINE.; nothing was uploaded"):
        probe_io.push(folder, "someone/probes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: HfApi(endpoint="http://127.0.0.1:9", **options))
    with pytest.raises(ValueError, match="cannot be reached"):
        probe_io.push(folder, "someone/probes", token="hf_x")


def test_the_exact_upload(tmp_path, monkeypatch):
    folder, calls = write(tmp_path / "set"), []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, *args, **options: calls.append((args, options)) or "address"
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
    assert probe_io.push(folder, "someone/probes", private=True) == "address"
    create, upload = calls
    assert create == (("someone/probes",), {"repo_type": "dataset", "private": True, "exist_ok": True})
    message = upload.pop("commit_message")
    assert upload == {"folder_path": folder, "repo_id": "someone/probes", "repo_type": "dataset"}
    assert message == f"Probe set my set, 2 probes, fingerprint {probe_set().fingerprint[:12]}"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "data.jsonl", "probe.yaml"]
    assert yaml.safe_load((folder / "probe.yaml").read_text())["metadata"] == ABOUT


@pytest.mark.parametrize("spoil", ["README.md", "data.jsonl"])
def test_an_incomplete_folder_is_not_uploaded(tmp_path, spoil):
    folder = write(tmp_path / "set")
    (folder / spoil).unlink()
    with pytest.raises(ValueError, match="is no probe set with a README.md"):
        probe_io.push(folder, "someone/probes")
