"""`trl-dynamics judge` as a user types it: planted judges and answers, a kill half-way, a real server."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from http_backend import Backend
from tiny import END, VOCAB_SIZE, tiny_model, tiny_tokenizer
from trl_dynamics import embedded
from trl_dynamics.cli.main import main

ROWS = embedded.preference_rows(40, split="test")
EMBEDDED = "--prompts embedded --num_prompts 40 --judge embedded"


def judge(line, *paths):
    """Run `trl-dynamics judge LINE`, with {0}, {1}, ... in it for paths."""
    return main(["judge", *shlex.split(line.format(*paths))])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, texts):
    return write(path, [{"prompt": r["prompt"], "response": t} for r, t in zip(ROWS, texts, strict=False)])


@pytest.fixture
def files(tmp_path):
    """The world's right and wrong answers, the right ones in disorder, and the questions."""
    right, wrong = ([row[side][0]["content"] for row in ROWS] for side in ("chosen", "rejected"))
    answers(tmp_path / "right.jsonl", right)
    answers(tmp_path / "wrong.jsonl", wrong)
    answers(tmp_path / "shuffled.jsonl", [" ".join(sorted(text.split())) for text in right])
    write(tmp_path / "questions.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    return tmp_path


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    backend = Backend()
    yield backend
    backend.stop()


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_right_answers_beat_wrong_ones_in_the_embedded_world(files, capsys):
    assert judge("{0}/right.jsonl {0}/wrong.jsonl -o {0}/out " + EMBEDDED, files) == 0
    found = summary(files / "out")
    assert (found["wins"], found["win_rate"], found["interval"]) == (40, 1.0, [1.0, 1.0])
    assert found["numbers"]["A"] == {"fact_right": 1.0, "grammatical": 1.0, "preferred": 1.0}
    assert found["numbers"]["B"] == {"fact_right": 0.0, "grammatical": 1.0, "preferred": 0.0}
    out = capsys.readouterr().out
    assert "win rate of A, (wins + ties/2)/prompts: 1.000, 95% interval 1.000 to 1.000" in out
    assert "no width because all prompts ended alike" in out and "none is possible" in out
    assert judge("{0}/wrong.jsonl {0}/right.jsonl -o {0}/back --seed 3 " + EMBEDDED, files) == 0
    assert summary(files / "back")["win_rate"] == 0.0
    # Whatever holds the prompts: rows without answers, a probe set's folder, preference rows.
    embedded.probe_set(40).save(files / "probes")
    line = "{0}/right.jsonl {0}/wrong.jsonl -o {0}/out --judge embedded --prompts {0}/questions.jsonl"
    assert judge(line, files) == 0
    assert "80 from before" in capsys.readouterr().out


def test_models_answer_and_a_second_call_does_nothing_twice(files, capsys):
    line = f"embedded {{0}}/wrong.jsonl -o {{0}}/out --max_new_tokens 40 {EMBEDDED}"
    assert judge(line, files) == 0
    found, kept = summary(files / "out"), (files / "out" / "verdicts.jsonl").read_bytes()
    assert found["numbers"]["A"]["grammatical"] > 0.9, "the shipped model answers in its own grammar"
    assert 0 <= found["interval"][0] <= found["win_rate"] <= found["interval"][1] <= 1
    capsys.readouterr()
    assert judge(line, files) == 0
    assert "verdicts: 0 new" in capsys.readouterr().out
    assert (files / "out" / "verdicts.jsonl").read_bytes() == kept
    assert judge(line + " --max_new_tokens 41", files) == 1
    assert "A, sampling, max_new_tokens was 40, now 41" in capsys.readouterr().err
    embedded.probe_set(3).save(files / "probes")
    same = "embedded embedded -o {0}/same --prompts {0}/probes --judge embedded --max_new_tokens 40"
    assert judge(same, files) == 0
    assert summary(files / "same")["identical"] == 3


def test_a_server_that_always_says_the_first_is_told_from_a_result(files, backend, capsys):
    backend.default = lambda question: "A"
    line = "{0}/right.jsonl {0}/wrong.jsonl -o {0}/out --prompts {0}/questions.jsonl --judge server --judge_model m"
    assert judge(line + f" --judge_url {backend.url}", files) == 0
    found = summary(files / "out")
    assert (found["win_rate"], found["position_bias"]["share"]) == (0.5, 1.0)
    assert found["by_order"] == {"A_first": 1.0, "B_first": 0.0}
    assert sum(backend.asked.values()) == 80 and max(backend.asked.values()) == 1
    assert "for 100.0% of 40 prompts the verdict follows the place" in capsys.readouterr().out


def test_replies_without_a_verdict_are_ties_and_counted(files, backend, capsys):
    backend.default = lambda question: "tie" if "sorry" in question else "I like both."
    (files / "q.txt").write_text("{prompt}|{first}|{second}")
    line = "{0}/right.jsonl {0}/wrong.jsonl -o {0}/out --prompts {0}/questions.jsonl --judge server --judge_model m"
    assert judge(line + f" --judge_url {backend.url} --judge_prompt {{0}}/q.txt", files) == 0
    found = summary(files / "out")
    assert found["verdicts"] == {"unparsable": 80} and (found["ties"], found["win_rate"]) == (40, 0.5)
    assert found["position_bias"]["share"] is None
    assert "could not be read, counted as ties: 80" in capsys.readouterr().out


def test_a_killed_comparison_asks_for_the_rest_only(files, backend):
    def slowly(question):
        time.sleep(0.05)
        return "B"

    backend.default = slowly
    line = "{0}/right.jsonl {0}/wrong.jsonl -o {0}/out --prompts {0}/questions.jsonl --judge server --judge_model m"
    line += f" --judge_url {backend.url} --concurrency 2"
    argv = [sys.executable, "-m", "trl_dynamics.cli.main", "judge", *shlex.split(line.format(files))]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    path, end = files / "out" / "verdicts.jsonl", time.monotonic() + 120
    while not (path.exists() and len(path.read_bytes().splitlines()) >= 10):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    *kept, last = path.read_bytes().splitlines(keepends=True)
    kept += [last] if last.endswith(b"\n") else []
    assert 10 <= len(kept) < 80
    assert judge(line, files) == 0
    assert path.read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    assert len({json.loads(row)["key"] for row in path.read_bytes().splitlines()}) == 80
    repeated = sum(backend.asked.values()) - 80
    assert len(backend.asked) == 80 and repeated <= 3, "only what was under way is asked again"
    assert summary(files / "out")["kept_verdicts"] == len(kept)


def save_reward_model(folder, num_labels=1):
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        num_labels=num_labels,
        pad_token_id=258,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_reward_model_judges_by_its_rewards(files):
    save_reward_model(files / "rm")
    line = "{0}/right.jsonl {0}/wrong.jsonl --prompts {0}/questions.jsonl --judge reward --judge_model {0}/rm"
    assert judge(line + " -o {0}/out", files) == 0
    rows = [json.loads(row) for row in (files / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    for row in rows:
        rewards = {side: row["numbers"][side]["reward"] for side in "AB"}
        assert row["verdict"] == max(rewards, key=rewards.get) and rewards["A"] != rewards["B"]
    found = summary(files / "out")
    assert found["position_bias"]["share"] == 0.0 and 0 < found["wins"] < 40
    assert judge(line + " -o {0}/plain --judge_format plain", files) == 0
    assert summary(files / "plain")["numbers"] != found["numbers"]
    assert judge(line + " -o {0}/ties --tie_margin 1e6", files) == 0
    assert summary(files / "ties")["ties"] == 40


def test_a_third_model_finds_its_own_language_likelier(files):
    line = "{0}/right.jsonl {0}/shuffled.jsonl --prompts {0}/questions.jsonl --judge likelihood --judge_model embedded"
    assert judge(line + " -o {0}/out", files) == 0
    found = summary(files / "out")
    assert found["win_rate"] == 1.0 and found["judge"]["unit"] == "nats per token"
    assert found["numbers"]["A"]["logp_mean"] - found["numbers"]["B"]["logp_mean"] > 2


def says_always_a(folder):
    """A tiny language model that was taught to answer every question with A, then to stop."""
    model, tokenizer = tiny_model(max_position_embeddings=4096), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    start = tokenizer(text="<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer(text=f"A{END}")["input_ids"]
    for _ in range(60):
        question = torch.randint(0, 256, (8, 64), generator=generator)
        ids = torch.cat([question, torch.tensor([start + answer] * 8)], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -len(answer) :] = ids[:, -len(answer) :]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_real_server_with_planted_position_bias(files, serve, capsys):
    model = says_always_a(files / "judge")
    line = "{0}/right.jsonl {0}/wrong.jsonl -o {0}/out --prompts {0}/questions.jsonl --num_prompts 6 --judge server"
    line += " --judge_model {1} --judge_max_new_tokens 8 --max_retries 1 --concurrency 2 --judge_url {2}/v1"
    assert judge(line, files, model, "http://127.0.0.1:9") == 1
    assert "cannot be reached" in capsys.readouterr().err
    server = serve(model)
    assert judge(line, files, model, server.url) == 0
    found = summary(files / "out")
    assert (found["win_rate"], found["verdicts"]) == (0.5, {"A": 6, "B": 6})
    assert found["position_bias"] == {"prompts": 6, "follows_first": 6, "follows_second": 0, "share": 1.0}
    server.kill()
    assert judge(line, files, model, server.url) == 0, "nothing is left to ask"


def test_wrong_inputs_are_one_line(files, capsys):
    tiny_model().save_pretrained(files / "lm")
    tiny_tokenizer().save_pretrained(files / "lm")
    save_reward_model(files / "rm2", num_labels=2)
    endless = tiny_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(files / "endless")
    (files / "nothing").mkdir()
    (files / "q.txt").write_text("{prompt}")
    write(files / "other.jsonl", [{"prompt": "Who wrote Emma?"}])
    write(files / "nulls.jsonl", [{"prompt": " "}])
    write(files / "columns.jsonl", [{"question": "Why?"}])
    sides, out = "{0}/right.jsonl {0}/wrong.jsonl", "-o {0}/out"
    prompts = "--prompts {0}/questions.jsonl"
    server = "--judge server --judge_model m"
    cases = {
        f"{sides} {out} --judge embedded": "--prompts is missing",
        f"{sides} {prompts} --judge embedded": "--output_dir is missing",
        f"{sides} {prompts} {out}": "--judge is missing",
        f"{sides} {prompts} {out} --judge embedded --colour 3": "unknown option '--colour'",
        f"{sides} {prompts} {out} --judge vote": "judge is 'vote', expected one of embedded, reward",
        f"{sides} {prompts} {out} --judge reward": "--judge reward needs --judge_model",
        f"{sides} {prompts} {out} {server}": "--judge server needs --judge_url",
        f"{sides} {prompts} {out} {server} --judge_url localhost": "neither http:// nor https://",
        f"{sides} {prompts} {out} {server} --judge_url http://h --judge_prompt {{0}}/q.txt": "no {first}",
        f"{sides} {prompts} {out} {server} --judge_url http://h --judge_prompt {{0}}/z.txt": "cannot be read",
        f"{sides} {prompts} {out} {server} --judge_url http://h --server_options [1]": "expected a mapping",
        f"{sides} {prompts} {out} --judge reward --judge_model {{0}}/lm": "a LlamaForCausalLM, no reward model",
        f"{sides} {prompts} {out} --judge reward --judge_model {{0}}/rm2": "has 2 outputs",
        f"{sides} {prompts} {out} --judge reward --judge_model {{0}}/nothing": "cannot be loaded",
        f"{sides} {prompts} {out} --judge likelihood --judge_model ./gone": "'./gone' does not exist",
        f"{sides} {prompts} {out} --judge likelihood --judge_model {{0}}/endless": "has no EOS token",
        f"{sides} {prompts} {out} --judge embedded --judge_format json": "judge_format is 'json'",
        f"{sides} {prompts} {out} --judge embedded --tie_margin -1": "tie_margin is -1",
        f"{sides} {prompts} {out} --judge embedded --temperature -1": "temperature -1",
        f"{sides} {prompts} {out} --judge embedded --num_prompts 0": "num_prompts is 0",
        f"{sides} {prompts} {out} --judge embedded --split test": "no split 'test'",
        f"{sides} {out} --judge embedded --prompts {{0}}/gone.jsonl": "gone.jsonl' does not exist",
        f"{sides} {out} --judge embedded --prompts {{0}}/other.jsonl": "not a question of the embedded world",
        f"{sides} {out} --judge embedded --prompts {{0}}/nulls.jsonl": "has no usable prompt",
        f"{sides} {out} --judge embedded --prompts {{0}}/columns.jsonl": "found the columns ['question']",
        f"{{0}}/gone.jsonl {{0}}/wrong.jsonl {prompts} {out} --judge embedded": "file of answers",
        f"{{0}}/right.jsonl {{0}}/gone/model {prompts} {out} --judge embedded": "does not exist",
        f"{{0}}/right.jsonl {{0}}/nothing {prompts} {out} --judge embedded": "holds no model",
        f"{sides} {prompts} -o {{0}} --judge embedded": "not empty and holds no comparison",
        f"{sides} {prompts} {out} --judge embedded --confidence 1.5": "confidence 1.5",
    }
    for line, message in cases.items():
        assert judge(line, files) == 1, line
        errors = [row for row in capsys.readouterr().err.splitlines() if row.startswith("trl-dynamics judge: error:")]
        assert len(errors) == 1 and message in errors[0], (line, errors)
    with pytest.raises(SystemExit) as usage:
        judge("{0}/right.jsonl --prompts embedded", files)
    assert usage.value.code == 2
