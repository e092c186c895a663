"""The LLM behind an OpenAI-compatible server: `transformers serve` with the bundled model, and a server of faults."""

import http.server
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from conftest import ROOT

import art
import evaluate

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-dev.txt")

KEY = "sk-fake-0123456789"
RECORD = {"id": "x", "question": "Ann picked 7 pens. Ben picked 2 fewer pens than Ann. How many pens did Ben pick?"}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A key that must never be seen again, one retry, and no proxy between here and the server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(art.Endpoint, "retries", 1)


# ---------------------------------------------------------------------------------------------------------------------
# A real server


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """(folder, address) of `transformers serve` with the bundled model; a chat template is put to it for the chat."""
    folder = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(ROOT / "data/toy/base", folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1",
               "--port", str(port), "--dtype", "float32", "--device", "cpu", "--log-level", "error",
               "--continuous-batching", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "512"]
    log = folder.with_name("log")
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def rows_of(batches):
    """The one row of each record, in order."""
    return [row for _, (row,) in sorted(pair for batch in batches for pair in batch)]


def test_texts_equal_the_local_model(served, lm, kit):
    """Greedily and in 32 bits, over /completions: predict, ask and refine write what the local model writes."""
    folder, url = served
    endpoint, records = art.Endpoint(url, str(folder), chat="no"), art.load_task("toy", "train", 50, kit.data)
    drafts = rows_of(art.predict(lm, "toy", records, max_new_tokens=48))
    asked = rows_of(art.ask(lm, "toy", records, [row["text"] for row in drafts], max_new_tokens=24))
    refined = rows_of(art.refine(lm, "toy", records, [row["text"] for row in drafts],
                                 [row["subquestions"] for row in asked], max_new_tokens=48))
    there = rows_of(art.predict(endpoint, "toy", records, max_new_tokens=48))
    for key in ("text", "answer", "stopped", "prompt_tokens"):
        assert [row[key] for row in there] == [row[key] for row in drafts]
    assert all(0 < row["tokens"] <= 48 and row["logprob"] is None for row in there)  # the server gives none
    there = rows_of(art.ask(endpoint, "toy", records, [row["text"] for row in drafts], max_new_tokens=24))
    assert [row["subquestions"] for row in there] == [row["subquestions"] for row in asked]
    assert {row["p_refine"] for row in there} <= {0.0, 1.0}
    there = rows_of(art.refine(endpoint, "toy", records, [row["text"] for row in drafts],
                               [row["subquestions"] for row in asked], max_new_tokens=48))
    assert [row["text"] for row in there] == [row["text"] for row in refined]


def test_chat_equals_the_local_model(served):
    """The same over /chat/completions, with instruction and exemplars as turns."""
    folder, url = served
    local, endpoint = art.LM(str(folder), bits=32), art.Endpoint(url, str(folder))
    assert local.chat and endpoint.chat
    exemplar = {"question": "Eve had 4 pens. Dan had 2 more pens than Eve. How many pens did Dan have?",
                "solution": [["How many pens did Dan have?", "Dan had 4 + 2 = 6 pens."]], "answer": "6"}
    local, there = (rows_of(art.predict(model, "toy", [RECORD, exemplar], [exemplar] * 2, max_new_tokens=24))
                    for model in (local, endpoint))
    for key in ("text", "prompt_tokens"):
        assert [row[key] for row in there] == [row[key] for row in local]


# ---------------------------------------------------------------------------------------------------------------------
# A server of faults: it answers each prompt by its last line, until told otherwise


class Server(http.server.ThreadingHTTPServer):
    """`fault(number, body)` may give (status, JSON or text) instead; `tokens` are [(token, {token: odds}), ...]."""

    def __init__(self, port=0, fault=None, texts=None, tokens=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.tokens, self.asked, self.count = fault, tokens, [], threading.Lock()
        self.texts = {"Answer:": "7 - 2 = 5\n#### 5\n", "Revised answer:": "#### 5\n",
                      "Sub-questions:": "How many?\nRefine: Yes"} | (texts or {})
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, answered as OpenAI's /completions and /chat/completions do."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.count:
            self.server.asked.append({"path": self.path, **body})
            number = len(self.server.asked)
        status, reply = self.server.fault(number, body) if self.server.fault else (None, None)
        if status is None:
            status, reply = 200, self.reply(body)
        content = reply if isinstance(reply, str) else json.dumps(reply)
        content = content.replace("THE KEY", self.headers["Authorization"]).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if content.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reply(self, body):
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        text = self.server.texts.get(prompt.splitlines()[-1], "")
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.server.tokens and "logprobs" in body:
            if chat:
                choice["logprobs"] = {"content": [
                    {"token": token, "logprob": odds[token], "top_logprobs": [
                        {"token": other, "logprob": logprob} for other, logprob in odds.items()]}
                    for token, odds in self.server.tokens]}
            else:
                choice["logprobs"] = {"tokens": [token for token, _ in self.server.tokens],
                                      "token_logprobs": [odds[token] for token, odds in self.server.tokens],
                                      "top_logprobs": [odds for _, odds in self.server.tokens]}
        return {"id": "x", "created": 0, "model": body["model"], "choices": [choice],
                "object": "chat.completion" if chat else "text_completion",
                "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}}


def ask(server, chat="yes"):
    return rows_of(art.ask(art.Endpoint(server.url, "x", chat), "toy", [RECORD], ["#### 9"]))[0]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a script in this process on 4 questions a split: (exit code, what it printed, the last line of stderr)."""
    for split in ("train", "dev", "test"):
        art.write_jsonl(tmp_path / f"data/toy/{split}.jsonl", [
            {**RECORD, "id": f"{split}-{i}", "answer": "5"} for i in range(4)])

    def call(main, *flags, data=tmp_path / "data"):
        monkeypatch.setattr(sys, "argv", [str(flag) for flag in (
            "script", *flags, "--data", data, "--runs", tmp_path / "runs")])
        code = 0
        try:
            art.run(main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        written = [path.read_text(errors="replace") for path in (tmp_path / "runs").rglob("*") if path.is_file()]
        for text in [printed.out, printed.err, *written]:
            assert KEY not in text and "Traceback" not in text
        return code, printed.out, printed.err.rstrip().splitlines()[-1] if printed.err else ""

    call.folder = tmp_path / "runs"
    return call


@pytest.mark.parametrize("chat", ["yes", "no"])
def test_decision_from_log_probabilities(chat):
    """p_refine is that of Yes against No at their place, and the text's probability that of its tokens."""
    tokens = [("How many?\n", {"How many?\n": -0.5}), ("Refine", {"Refine": -0.25}), (":", {":": -0.25}),
              (" Yes", {" Yes": math.log(0.6), " No": math.log(0.2), "Yes": -9.0})]
    with Server(tokens=tokens) as server:
        row = ask(server, chat)
        assert row["subquestions"] == ["How many?"] and row["p_refine"] == pytest.approx(0.75)
        assert (row["tokens"], row["prompt_tokens"], row["stopped"]) == (5, 11, True)
        assert [asked["path"] for asked in server.asked] == ["/v1/chat/completions" if chat == "yes" else
                                                             "/v1/completions"]
        endpoint = art.Endpoint(server.url, "x", chat)
        prompt = endpoint.render(art.ask_prompt(RECORD, "#### 9"))
        (_, (made,)), = next(endpoint.generate([prompt], stop=re.compile(art.DECISION)))
        assert made["text"] == "How many?\nRefine:" and made["logprob"] == pytest.approx(-1.0)
        tokens[3] = (" Yes", {" Yes": -0.1, " Maybe": -5.1})  # No is not listed: at most as likely as Maybe
        assert ask(server, chat)["p_refine"] == pytest.approx(1 / (1 + math.exp(-5)))
        tokens[3:] = [(" Y", {" Y": 0.0}), ("es", {"es": 0.0})]  # cut in two: no odds, the word stands
        assert ask(server, chat)["p_refine"] == 1.0


@pytest.mark.parametrize("chat", ["yes", "no"])
def test_decision_from_text(chat):
    """Without log-probabilities: the word that was written, else the answer to the question outright, else No."""
    def fault(number, body):
        if "logprobs" in body:
            return 400, {"error": {"message": "this model gives no logprobs"}}
        return None, None

    outright = "Refine: Yes or No?" if chat == "yes" else "Refine:"
    for text, then, p in [("How many?\nRefine: **No**", "", 0.0), ("How many?\nRefine: yes.", "", 1.0),
                          ("How many?", " Yes", 1.0), ("How many?", "Perhaps", 0.0)]:
        with Server(fault=fault, texts={"Sub-questions:": text, outright: then}) as server:
            row = ask(server, chat)
            assert row["p_refine"] == p and row["subquestions"] == ["How many?"]
            assert len(server.asked) == (3 if then else 2) and "logprobs" not in server.asked[-1]  # refused only once
            if then:  # room for a word
                assert server.asked[-1]["max_completion_tokens" if chat == "yes" else "max_tokens"] == 8


def test_text_is_cut_as_locally():
    """Behind the answer line or before the next question, whether or not the server gives the stop string back."""
    for text in ("7 - 2 = 5\n#### 5", "7 - 2 = 5\n#### 5\nQuestion:", "7 - 2 = 5\n#### 5\n\nQuestion: B?\nAnswer:\n6"):
        with Server(texts={"Answer:": text}) as server:
            row, = rows_of(art.predict(art.Endpoint(server.url, "x", "no"), "toy", [RECORD]))
            assert (row["text"], row["answer"], row["stopped"]) == ("7 - 2 = 5\n#### 5", "5", True)
            assert server.asked[0]["stop"] == ["\nQuestion:"] and server.asked[0]["temperature"] == 0
    with Server(texts={"Sub-questions:": "How many?\nQuestion: B?", "Refine:": " Yes"}) as server:
        assert ask(server, "no")["subquestions"] == ["How many?"]


def test_choice_from_text():
    """A chat model may write more than the letter."""
    for text, p in (("A", [1, 0]), ("**Answer B**", [0, 1]), ("Neither", [0.5, 0.5])):
        choice = {"initial": "#### 5", "refined": "#### 6"}
        with Server(texts={"Better answer:": text}) as server:
            row, = rows_of(art.choose(art.Endpoint(server.url, "x"), [RECORD], [choice]))
            assert row["initial"] == row["refined"] == 0.5  # the same letter in both orders says nothing
            first = rows_of(art.Endpoint(server.url, "x").generate(
                [[{"role": "user", "content": "Better answer:"}]], max_new_tokens=1, options=(["A", "B"], True)))
            assert art.probability(first[0]["logit"]) == (0 if text == "Neither" else p[0])


@pytest.mark.parametrize(("status", "requests", "said"), [
    (401, 1, "OPENAI_API_KEY"), (404, 1, "--model"), (400, 1, "no such"), (429, 2, "2 tries"), (503, 2, "2 tries")])
def test_errors_are_one_line(command, status, requests, said):
    """At once where trying again is no use; no key, though the server repeats it."""
    with Server(fault=lambda *_: (status, {"error": {"message": "no such thing with THE KEY"}})) as server:
        code, _, line = command(art.main, "sample", "--base-url", server.url, "--model", "x", "--limit", 1)
        assert code == 2 and line.startswith(f"error: {server.url}") and said in line
        assert len(server.asked) == requests


def test_one_refused_question_has_failed(command):
    """Its content, or its length: it counts as wrong, and the others are asked."""
    def refuse(number, body):
        if "Ann picked 9" in str(body):
            return 400, {"error": {"message": "this content is not \x1b[2J for us"}}
        return None, None

    data = [{**RECORD, "id": f"{i}", "question": RECORD["question"].replace("7", str(i)), "answer": "5"}
            for i in (7, 8, 9)]
    with Server(fault=refuse) as server:
        endpoint = art.Endpoint(server.url, "x", concurrency=1)
        made = rows_of(art.predict(endpoint, "toy", data[::-1]))[::-1]  # refused before anything is answered
        assert [row.get("failed", False) for row in made] == [False, False, True]
        assert [art.verdict("toy", row, "5") for row in made] == [True, True, False]
        asked = rows_of(art.ask(endpoint, "toy", data, [row["text"] for row in made]))
        assert [row["p_refine"] for row in asked] == [1, 1, 0]
    with Server(fault=refuse) as server, pytest.raises(art.UserError, match=r"not \\x1b\[2J for us"):
        rows_of(art.predict(art.Endpoint(server.url, "x"), "toy", data[2:]))  # nothing was answered: no one is to blame


def test_many_refused_questions_end_the_run():
    """One answer, then eleven refusals in a row: it is not the questions, it is the request."""
    def refuse(number, body):
        return (None, None) if number == 1 else (400, {"error": {"message": "no more today"}})

    data = [{**RECORD, "id": f"{i}"} for i in range(20)]
    with Server(fault=refuse) as server:
        made = art.predict(art.Endpoint(server.url, "x", concurrency=1), "toy", data)
        done = [next(made) for _ in range(11)]
        assert [several[0].get("failed", False) for batch in done for _, several in batch] == [False] + 10 * [True]
        with pytest.raises(art.UserError, match="no more today"):
            next(made)


def test_error_does_not_wait_for_other_requests():
    """Requests that hang keep neither the error nor the end of the process waiting."""
    hang = threading.Event()

    def fault(number, body):
        if number > 1:
            hang.wait(60)
        return 404, {"error": {"message": "no such thing"}}

    with Server(fault=fault) as server, pytest.raises(art.UserError, match="no such thing"):
        before = set(threading.enumerate())
        try:
            rows_of(art.predict(art.Endpoint(server.url, "x"), "toy", [RECORD] * 4))
        finally:
            left = [thread for thread in set(threading.enumerate()) - before if "work" in thread.name]
            assert left and all(thread.daemon for thread in left)
            hang.set()


def test_replies_that_no_one_expects(monkeypatch):
    with Server(texts={"Answer:": "#### 5 \ud800\n"}) as server:  # half a character
        made, = rows_of(art.predict(art.Endpoint(server.url, "x"), "toy", [RECORD]))
        assert made["text"] == "#### 5 ?" and made["answer"] == "5"
        with pytest.raises(art.UserError, match="wrote 5 tokens where 3 were allowed"):
            rows_of(art.predict(art.Endpoint(server.url, "x"), "toy", [RECORD], max_new_tokens=3))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u201cfake\u201d")
    with pytest.raises(art.UserError, match="OPENAI_API_KEY has characters"):
        art.Endpoint("http://127.0.0.1:9/v1", "x")


def test_server_that_is_none(command):
    for page in ("<html>Welcome</html>", "{broken", "{}"):
        with Server(fault=lambda *_, page=page: (200, page)) as server:
            assert "end in /v1" in command(art.main, "sample", "--base-url", server.url, "--model", "x")[2]
    code, _, line = command(art.main, "sample", "--base-url", server.url, "--model", "x")
    assert code == 2 and server.url in line and "goes on from there" in line
    secret = server.url.replace("//", f"//me:{KEY}@") + f"?key={KEY}"
    assert command(art.main, "sample", "--base-url", secret, "--model", "x")[0] == 2  # `command` looks for the key
    assert "http://" in command(art.main, "sample", "--base-url", "localhost:8000", "--model", "x")[2]
    assert "--model NAME" in command(art.main, "sample", "--base-url", server.url)[2]
    flags = ["--base-url", server.url, "--model", "x", "--concurrency", 0]
    assert "--concurrency is 1" in command(art.main, "sample", *flags)[2]


def test_without_the_client(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    code, _, line = command(art.main, "sample", "--base-url", "http://127.0.0.1:9/v1", "--model", "x")
    assert code == 2 and "pip install openai" in line


def test_server_stops_half_way(command):
    """What was finished is kept; when the server is back the same command makes the rest and nothing twice."""
    def stop(number, body):
        if number > 5:
            server.__exit__()
            return 503, {}
        return None, None

    flags = ["sample", "--model", "x", "--k", 2, "--concurrency", 2, "--base-url"]
    with Server(fault=stop) as server:
        code, _, line = command(art.main, *flags, server.url)
        assert code == 2 and "Connection error" in line and "goes on from there" in line
    path = command.folder / "toy/samples.jsonl"
    kept = art.read_jsonl(path)
    assert 0 < len(kept) <= 5
    with Server() as server:  # at another port: an address is no part of what made the samples
        assert command(art.main, *flags, server.url)[0] == 0
        assert len(server.asked) == 4 * 2 + 4 * (1 + 2) - len(kept)
    rows = art.read_jsonl(path)
    assert rows[: len(kept)] == kept and len({(row["id"], row["sample"]) for row in rows}) == len(rows) == 20
    assert len({asked["seed"] for asked in server.asked if asked["temperature"]}) > 2


def test_all_scripts_take_an_endpoint(command, kit):
    """sample, evaluate and solve with the LLM behind a server, Asker and Truster here."""
    for name in ("asker", "truster"):
        shutil.copytree(kit.runs / "toy/default" / name, command.folder / "toy/default" / name)
    flags = ["--data", kit.data, "--limit", 5, "--model", "x", "--base-url"]
    with Server() as server:
        code, out, line = command(art.main, "sample", *flags, server.url)
        assert code == 0 and "x: 0 exemplars, chat template" in out, line
        assert "train it again, or name it with --adapters" in command(evaluate.main, *flags, server.url)[2]
        assert command(evaluate.main, *flags, server.url, "--adapters", command.folder / "toy/default")[0] == 0
        assert "4 trust" in command(art.main, "solve", *flags, server.url, RECORD["question"])[1]
    results = json.loads((command.folder / "toy/default/results.json").read_text())
    assert results["models"]["llm"] == {"model": "x", "parameters": None}
    costs = {row["row"]: row["cost"] for row in results["rows"]}
    assert costs["initial"]["llm"] == {"prompt_tokens": 11, "tokens": 5, "flops": None}
    assert costs["art"]["asker"]["flops"] > 0
    about = json.loads((command.folder / "toy/samples.args.json").read_text())
    assert (about["model"], about["revision"]) == ("x", "endpoint") and "127.0.0.1" not in json.dumps(about)
