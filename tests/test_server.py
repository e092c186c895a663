"""The LLM behind an OpenAI-compatible server: a fake one that can be told to fail, and `transformers serve`."""

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from conftest import BASE, asked_of, refused

import art

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-dev.txt")

KEY = "sk-fake-0123456789"
RECORD = {"id": "x", "question": "Ann picked 7 pens. Ben picked 2 fewer pens than Ann. How many pens did Ben pick?"}


CUES = {art.instruction("toy", step): cue for step, cue in (  # a chat is told what to do in the place of the cue
    ("cot", "Answer:"), ("ask", "Sub-questions:"), ("refine", "Revised answer:"), ("refine_plain", "Revised answer:"))}


class Server(http.server.ThreadingHTTPServer):
    """It answers each prompt by its last line. `fault(number, body)` may give (status, JSON or text) instead;
    `tokens` are [(token, {token: log-probability}), ...] of every answer, where log-probabilities are asked for."""

    request_queue_size = 64

    def __init__(self, fault=None, texts=None, tokens=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.tokens, self.asked, self.lock = fault, tokens, [], threading.Lock()
        self.texts = {"Answer:": "7 - 2 = 5\n#### 5\n", "Revised answer:": "#### 5\n", "Refine:": " Yes",
                      "Refine: Yes or No? Answer with this one word.": " Yes",
                      "Sub-questions:": "How many?\nRefine: Yes"} | (texts or {})
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append({"path": self.path, **body})
            number = len(self.server.asked)
        status, reply = (self.server.fault and self.server.fault(number, body)) or (200, self.reply(body))
        content = reply if isinstance(reply, str) else json.dumps(reply)
        content = content.replace("THE KEY", self.headers["Authorization"]).encode()  # a server that tells all
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if content.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def reply(self, body):
        chat, tokens = "messages" in body, self.server.tokens if body.get("logprobs") else None
        last = (body["messages"][-1]["content"] if chat else body["prompt"]).splitlines()[-1]
        text = self.server.texts.get(CUES.get(last, last), "")
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if tokens and chat:
            choice["logprobs"] = {"content": [{"token": token, "logprob": -0.5, "top_logprobs": [
                {"token": other, "logprob": p} for other, p in others.items()]} for token, others in tokens]}
        elif tokens:
            choice["logprobs"] = {"tokens": [token for token, _ in tokens], "token_logprobs": [-0.5] * len(tokens),
                                  "top_logprobs": [others for _, others in tokens]}
        return {"id": "x", "created": 0, "model": body["model"], "choices": [choice],
                "object": "chat.completion" if chat else "text_completion",
                "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}}


@pytest.fixture(autouse=True)
def no_key_is_told(monkeypatch, tmp_path, capsys):
    """No proxy, and a key that must be neither in what any test prints nor in a file that it writes."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    yield
    told = [*capsys.readouterr(), *(p.read_text("utf-8", "replace") for p in tmp_path.rglob("*.json*") if p.is_file())]
    assert not any(KEY in text for text in told)


@pytest.fixture
def llm_at(make_run):
    """The LLM behind a server, with a file of its own."""
    def make(server, **changes):
        return make_run(**{"base_url": server.url, "model": "x", "chat": "yes", **changes}).model("llm")
    return make


def ask(lm, draft="#### 9"):
    return art.ask(lm, lm.run.args, [RECORD], [{"text": draft}])[0]


def predict(lm, *questions):
    records = [{"question": question} for question in questions or (RECORD["question"],)]
    return art.predict(lm, lm.run.args, records, lm.run.args.draft_temperature)


@pytest.mark.parametrize("chat", ["yes", "no"])
def test_requests(llm_at, chat):
    """Turns that end in the instruction, an exemplar as turns; or plain text. Greedy, with room for the answer."""
    with Server(tokens=[("5", {"5": -0.5}), (".", {".": -0.5})]) as server:
        lm = llm_at(server, chat=chat, shots=1, task="gsm8k")
        (made,) = predict(lm)
        sent = server.asked[0]
        art.sample_answers(lm, lm.run.args, [RECORD, {"question": "Two?"}], 3, 0.7)
    assert len({one["seed"] for one in server.asked[1:]}) == 6 and server.asked[1]["temperature"] == 0.7
    assert (made["text"], made["answer"], made["stopped"]) == ("7 - 2 = 5\n#### 5", "5", True)
    assert (made["tokens"], made["prompt_tokens"], made["logprob"], sent["temperature"]) == (5, 11, -1.0, 0)
    if chat == "yes":
        assert sent["path"] == "/v1/chat/completions" and sent["max_completion_tokens"] == 48
        assert [turn["role"] for turn in sent["messages"]] == ["user", "assistant", "user"]
        assert sent["messages"][-1]["content"].endswith(art.instruction("gsm8k", "cot"))
        assert sent["messages"][1]["content"].endswith("#### 15")
    else:
        assert sent["path"] == "/v1/completions" and sent["max_tokens"] == 48 and sent["stop"] == ["\nQuestion:"]
        assert sent["prompt"].endswith(f"#### 15\n\nQuestion: {RECORD['question']}\nAnswer:\n")


@pytest.mark.parametrize("chat", ["yes", "no"])
@pytest.mark.parametrize(("others", "p"), [
    ({" Yes": math.log(0.6), " No": math.log(0.2), "Yes": -9.0}, 0.75),
    ({" Yes": -0.1, " Maybe": -5.1}, 1 / (1 + math.exp(-5))),  # not listed: at most as likely as the last listed
    ({" Yes": -9999.0, " No": 0.0}, 0.0),
    ({}, 1.0),  # a server that lists none: the word stands
])
def test_decision_from_log_probabilities(llm_at, chat, others, p):
    with Server(tokens=[("Perhaps", {"Perhaps": -0.5}), (" Yes", others)]) as server:
        asked = ask(llm_at(server, chat=chat))
    assert asked["subquestions"] == ["How many?"] and asked["p_refine"] == pytest.approx(p)
    assert asked["prompt_tokens"] == 22  # of the sub-questions, and of the decision behind them
    if chat == "yes":
        assert server.asked[1]["messages"][-1]["content"].startswith("Refine: Yes or No?")


def refuse_logprobs(number, body):
    return (400, {"error": {"message": "logprobs are not for you"}}) if "logprobs" in body else None


@pytest.mark.parametrize(("word", "p"), [(" Yes", 1.0), ("**No**", 0.0), ("Perhaps", 0.0)])
def test_decision_from_words(llm_at, word, p):
    """Where log-probabilities are refused; they are asked for once."""
    question = "Refine: Yes or No? Answer with this one word."
    with Server(refuse_logprobs, texts={question: word}) as server:
        assert ask(llm_at(server))["p_refine"] == p
        assert ["logprobs" in sent for sent in server.asked] == [True, False, False]


def test_many_requests_at_once_may_be_refused_log_probabilities(llm_at):
    """All that are on their way when the first one is refused are asked again without."""
    barrier = threading.Barrier(8, timeout=5)

    def fault(number, body):
        if "logprobs" in body:
            barrier.wait()
        return refuse_logprobs(number, body)

    with Server(fault) as server:
        made = predict(llm_at(server), *(f"How many, {i}?" for i in range(8)))
    assert [one["answer"] for one in made] == ["5"] * 8


def refuse_nine(number, body):
    return (400, {"error": {"message": "not for THE KEY"}}) if "picked 9" in str(body) else None


@pytest.mark.parametrize("order", [(7, 8, 9), (9, 8, 7)])
def test_a_question_that_is_refused_has_failed(llm_at, capsys, order):
    """It counts as wrong and is asked again by the next start, wherever it stands; the others are kept."""
    questions = [f"Ann picked {n} pens. How many?" for n in order]
    with Server(refuse_nine) as server:
        made = predict(llm_at(server, concurrency=1), *questions)
        assert [bool(one.get("failed")) for one in made] == [n == 9 for n in order]
        assert "rejected a question" in (err := capsys.readouterr().err) and KEY not in err
        server.fault, before = None, len(server.asked)
        assert [one["answer"] for one in predict(llm_at(server), *questions)] == ["5"] * 3
        assert len(server.asked) == before + 1


@pytest.mark.parametrize(("answered", "questions"), [(1, 20), (0, 3)])
def test_many_refused_questions_end_the_run(llm_at, answered, questions):
    """Ten in a row, or all of a few: not the questions are to blame, but the request."""
    with Server(lambda number, body: number > answered and (400, {"error": {"message": "no more today"}})) as server:
        with pytest.raises(art.UserError, match="no more today"):
            predict(llm_at(server, concurrency=1), *(f"How many, {i}?" for i in range(questions)))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(llm_at, status):
    with Server(lambda number, body: number < 3 and (status, {"error": {"message": "busy"}})) as server:
        assert predict(llm_at(server))[0]["answer"] == "5" and len(server.asked) == 3


@pytest.mark.parametrize(("status", "reply", "said"), [
    (401, {"error": {"message": "wrong key THE KEY"}}, "OPENAI_API_KEY"), (404, {"error": "no such"}, "--model"),
    (200, "<html>Welcome</html>", "end in /v1"), (200, "{}", "end in /v1"), (200, "{broken", "end in /v1")])
def test_errors_are_one_line(copy, monkeypatch, capsys, status, reply, said):
    with Server(lambda *_: (status, reply)) as server:
        line = refused(monkeypatch, capsys, copy, "sample", "--base-url", server.url, "--model", "x")
    assert said in line and KEY not in line


def test_wrong_addresses(copy, monkeypatch, capsys):
    def line(*flags):
        return refused(monkeypatch, capsys, copy, "sample", *flags)

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    assert "--base-url" in line("--base-url", "http://127.0.0.1:9/v1", "--model", "x", "--limit", "1")
    assert "such as http://" in line("--base-url", "localhost:8000", "--model", "x")
    assert "--base-url needs --model NAME" in line("--base-url", "http://localhost:8000/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in line("--base-url", "http://127.0.0.1:9/v1", "--model", "x")


def test_temperature_none(llm_at):
    """A server that refuses the parameter: one line names the flags, and with them it is in no request of any step."""
    def fault(number, body):
        return "temperature" in body and (400, {"error": {"message": "temperature is not supported"}})

    with Server(fault) as server:
        with pytest.raises(art.UserError, match="--temperature none --draft-temperature none"):
            predict(llm_at(server))
        lm = llm_at(server, temperature="none", draft_temperature="none")
        drafts = predict(lm)
        asked = ask(lm)
        refined = art.refine(lm, lm.run.args, [RECORD], drafts, [asked])
        art.trust_self(lm, lm.run.args, [RECORD], drafts, refined)
        assert refined[0]["answer"] == "5" and asked["subquestions"] == ["How many?"]


def test_half_a_character(llm_at, copy, monkeypatch, capsys):
    """It can be written into every file, and is known to the next start."""
    with Server(texts={"Answer:": "7 - 2 = 5 \ud800\n#### 5\n"}) as server:
        flags = ["--base-url", server.url, "--model", "x", "--limit", "3"]
        copy.here(monkeypatch, "sample", *flags)
        before = len(server.asked)
        copy.here(monkeypatch, "sample", *flags)
        assert len(server.asked) == before
    assert art.read_jsonl(copy.runs / "toy/samples.jsonl", "")[0]["samples"][0]["answer"] == "5"


def test_server_stops_half_way(copy, monkeypatch, capsys):
    """What was finished is kept; when it is back, the same command asks the rest and nothing twice."""
    flags = ["--model", "x", "--limit", "4", "--k", "2", "--draft-temperature", "0", "--concurrency", "2", "--base-url"]
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with Server(lambda number, body: number > 5 and (503, {})) as server:
        assert "what is finished is kept" in refused(monkeypatch, capsys, copy, "sample", *flags, server.url)
        kept = {(str(sent["messages"]), sent["seed"]) for sent in server.asked[:5]}
        server.fault, server.asked = None, []
        copy.here(monkeypatch, "sample", *flags, server.url)
    asked = {(str(sent["messages"]), sent["seed"]) for sent in server.asked}
    assert not asked & kept and len(asked | kept) == 8 * 2 + 4  # samples of train and dev, and the drafts of dev


def test_all_scripts_take_a_server(copy, monkeypatch, capsys):
    """The LLM there, Asker and Truster here; later scripts take the address from llm.json."""
    with Server() as server:
        copy.here(monkeypatch, "sample", "--base-url", server.url, "--model", "x", "--k", "1")
        copy.here(monkeypatch, "evaluate", "--threshold", "0")
        asked = asked_of(capsys.readouterr().out)
        copy.here(monkeypatch, "solve", RECORD["question"])
    assert asked["draft"] == 12 and asked["ask_self"] == 24 and asked["trust"] > 0
    results = json.loads((copy.runs / "toy/default/results.json").read_text())
    assert results["llm"] == "x" and results["machines"] == ["cpu float32", "server"]
    assert "4 trust" in capsys.readouterr().out


@pytest.fixture
def served(tmp_path):
    """Address of `transformers serve` with the toy's base."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", BASE, "--host", "127.0.0.1", "--port",
               str(port), "--dtype", "float32", "--device", "cpu", "--log-level", "error"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_real_server_writes_what_the_local_model_writes(served, make_run, tmp_path):
    """Greedily and in 32 bits: the drafts, and the sub-questions of the same model."""
    records = [{"question": RECORD["question"].replace("7", str(n))} for n in range(7, 13)]
    made = []
    for name, changes in (("here", {}), ("there", {"base_url": served, "model": BASE, "chat": "no"})):
        run = make_run(tmp_path / name, **changes)
        drafts = art.predict(run.model("llm"), run.args, records)
        asked = art.ask(run.model("llm"), run.args, records, drafts)
        made.append([[one[key] for key in ("text", "answer", "stopped", "prompt_tokens")] for one in drafts]
                    + [one["subquestions"] for one in asked])
    assert made[0] == made[1]
