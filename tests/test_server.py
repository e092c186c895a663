"""The LLM on a server with OpenAI's API: a fake server, which a test can make fail."""

import http.server
import json
import math
import re
import sys
import threading

import pytest
from conftest import asked_of

import art

pytest.importorskip("openai", reason="run pip install -r requirements-dev.txt")
KEY = "sk-fake-0123456789"
RECORD = {"question": "Ann picked 7 pens. Ben picked 2 fewer. How many pens did Ben pick?"}
DECIDE = "Refine: Yes or No? Answer with this one word."
TEXTS = {"cot": "<think>7?\n#### 7\n</think>7 - 2 = 5\n#### 5\n", "refine": "#### 5",
         "ask": "<think>Why?\nRefine: No\n</think>How many?\nRefine: Yes", DECIDE: " Yes"}
STEPS = {text.format(end=art.END["number"]): step for step, text in art.INSTRUCTIONS.items()}
SETTINGS = ("temperature", "logprobs", "top_logprobs", "seed", "max_completion_tokens")
UNSURE, SURE = ("No", {"No": -0.5, "Yes": -0.9}), (" no", {" no": -0.1, " a": -3.0})


def reply_of(content, tokens=(), **changes):
    """A reply. `tokens` are (token, {token: log-probability} of those listed for its place)."""
    listed = [{"token": token, "logprob": -0.5, "top_logprobs": [
        {"token": other, "logprob": p} for other, p in top.items()]} for token, top in tokens or ()]
    choice = {"finish_reason": "stop", "message": {"content": content},
              "logprobs": {"content": listed} if tokens else None, **changes}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 5}}


class Server(http.server.ThreadingHTTPServer):
    """It keeps all requests in `asked`. `fault(number, body)` may give (status, reply) instead."""

    request_queue_size, fault, tokens = 64, None, [("5", {}), (".", {})]

    def __init__(self, make_run):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.make_run = f"http://127.0.0.1:{self.server_port}/v1", make_run
        self.asked, self.texts = [], dict(TEXTS)

    def llm(self, *folder, **changes):
        """The LLM on this server."""
        return self.make_run(*folder, base_url=self.url, model="x", **changes)


class Handler(http.server.BaseHTTPRequestHandler):
    log_message = staticmethod(lambda *_: None)

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.asked.append(body := {"path": self.path, **json.loads(body)})
        last = body["messages"][-1]["content"].splitlines()[-1]
        text = server.texts.get(STEPS.get(last, last))
        fault = server.fault and server.fault(len(server.asked), body)
        status, reply = fault or (200, reply_of(text, "logprobs" in body and server.tokens))
        reply = reply if isinstance(reply, str) else json.dumps(reply)
        reply = reply.replace("THE KEY", self.headers["Authorization"]).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if reply[:1] == b"<" else "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


@pytest.fixture
def server(make_run, monkeypatch, tmp_path, capsys):
    """The key must be neither in what a test prints nor in a file that it writes."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with Server(make_run) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
    assert KEY not in "".join(capsys.readouterr())
    files = [*tmp_path.rglob("*.json*"), *tmp_path.rglob("*.sqlite")]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def ask(llm):
    return art.ask(llm, llm.args, [RECORD], [{"text": "#### 9"}])[0]


def predict(llm, *numbers):
    records = [{"question": f"Ann picked {number} pens. How many?"} for number in numbers]
    return art.predict(llm, llm.args, records or [RECORD])


def sample(llm, numbers=(0, 1), temperature=0.7):
    return art.sample_answers(llm, llm.args, [RECORD, {"question": "2?"}], numbers, temperature)


def refuse(*names):
    """A fault: the server refuses these settings, some in OpenAI's form, some in Mistral's."""
    def fault(number, body):
        for name in set(names) & set(body):
            said = {"detail": [{"loc": ["body", name]}]}, {"error": {"message": f"no {name}"}}
            return (400, 403, 422)[number % 3], said[number % 3 < 2]
    return fault


def test_request_is_repeated_while_the_server_is_busy(server):
    server.fault = lambda number, _: number < 4 and ((429, 500, 503)[number - 1], {})
    [output] = predict(server.llm(task="gsm8k"))
    assert output == {"text": "7 - 2 = 5\n#### 5", "answer": "5", "finished": True, "failed": "",
                      "tokens": 5, "prompt_tokens": 11, "logprob": -1.0}
    [sent, *repeated] = server.asked
    assert repeated == [sent] * 3 and sent["path"] == "/v1/chat/completions"
    assert sent["temperature"] == 0 and "seed" not in sent
    asked = f"Question: {RECORD['question']}\n\nAnswer the question. Reason step by step, and "
    assert sent["messages"] == [{"role": "user", "content": asked + art.END["number"]}]


def test_seeds_differ_for_each_sample_and_are_equal_between_runs(server, tmp_path):
    seeds = []
    for name, sample_seed in (("a", 0), ("b", 0), ("c", 1)):
        server.asked = []
        sample(server.llm(tmp_path / name, sample_seed=sample_seed))
        assert {sent["temperature"] for sent in server.asked} == {0.7}
        seeds.append({(str(sent["messages"]), sent["seed"]) for sent in server.asked})
    assert len({seed for _, seed in seeds[0]}) == 4
    assert seeds[0] == seeds[1] and not seeds[0] & seeds[2]


@pytest.mark.parametrize(("text", "p", "tokens"), [
    ("Yes", 0.75, [("", {}), (" Yes", {" Yes": math.log(0.6), " No": math.log(0.2), "a": -2})]),
    ("YES", 0.9167, [("YES", {"YES": -0.1, "NO": -2.5, "No": -9.0})]),
    ("Yes", 0.0, [("Yes", {"Yes": -9999.0, "No": 0.0})]),
    ("Yes", 1.0, [("Yes", {"Yes": None, "No": -3.0})]),  # not usable, so the word counts
    ("No, I see no gap", 0.401, [UNSURE, (", I see", {}), SURE, (" gap", {})]),
    ("I see no gap: No", 0.401, [("I see", {}), SURE, (" gap:", {}), UNSURE, ("<|end|>", {})]),
    ("No", 0.401, [SURE, UNSURE]),  # the first token is a hidden thought
    *((*word, ()) for word in [
        ("yes", 1.0), ("**Refine: YES**", 1.0), ("NO.", 0.0), ("Refine: No, 9 is correct.", 0.0),
        ("<think>No. Refine: No</think>\n\nYes", 1.0), ("Yesterday", None), ("No idea.", None),
        ("Yes or No?", None), ("", None), ("<think>Yes, yes", None)])])
def test_decision(server, text, p, tokens):
    """From log-probabilities, else from the word. One that cannot be read has failed."""
    server.texts[DECIDE], server.tokens = text, tokens
    asked = ask(server.llm())
    assert bool(asked["failed"]) == math.isnan(asked["p_refine"]) == (p is None)
    assert p is None or asked["p_refine"] == pytest.approx(p, abs=5e-4)
    assert asked["subquestions"] == ["How many?"]
    assert asked["prompt_tokens"] == (11 if p is None else 22)  # of both
    assert server.asked[1]["max_completion_tokens"] == 48  # room to think
    ask(server.llm())
    assert len(server.asked) == 2 + (p is None)  # the decision alone was not cached


PARTS = (("thinking", "7"), ("text", "#### "), ("image", None), ("text", "5"))
PARTS = [{"type": kind, "text": text} for kind, text in PARTS]
ODD = [*((reason, True) for reason in ("stop", "STOP", "end_turn")),
       *((reason, False) for reason in ("length", "MAX_TOKENS", "model_length", None))]
ODD = [(reply_of("#### 5", finish_reason=reason), finished) for reason, finished in ODD] + [
    (reply_of("#### 5\nQuestion: 6", finish_reason="length"), True), (reply_of(PARTS), True),
    *(({**reply_of("#### 5"), "usage": usage}, True) for usage in ({}, None)),
    *((reply_of("#### 5", logprobs=odd), True) for odd in (
        {"content": [{"token": "5", "logprob": None}]}, {"content": None}, {"tokens": ["5"]}))]


@pytest.mark.parametrize(("reply", "finished"), ODD)
def test_odd_replies_are_read(server, reply, finished):
    """A text is finished only if the reply says so, or if it has an answer line."""
    server.fault = lambda *_: (200, reply)
    [output] = predict(server.llm())
    assert (output["text"], output["answer"], output["failed"]) == ("#### 5", "5", "")
    assert output["finished"] == finished


@pytest.mark.parametrize("names", [*zip(SETTINGS), SETTINGS], ids=",".join)
def test_a_refused_setting_is_left_out(server, capsys, names):
    """One line says so, also of eight requests at a time; servers.json tells the next start."""
    together = threading.Barrier(8)
    server.fault = lambda number, body: (
        (number > 8 or together.wait(60) < 8) and refuse(*names)(number, body))
    first = sample(server.llm(concurrency=8), range(4))
    assert {output["answer"] for outputs in first for output in outputs} == {"5"}
    said = re.findall("the server refuses (.*): ", capsys.readouterr().out)
    assert len(said) == len(set(said)) and set(names) <= set(", ".join(said).split(", "))
    server.fault, server.asked = refuse(*names), []
    assert sample(server.llm(), range(4)) == first and not server.asked
    predict(server.llm(), 8)
    [sent] = server.asked
    assert not set(names) & set(sent) and "refuses" not in capsys.readouterr().out
    assert sent.get("max_completion_tokens", sent.get("max_tokens")) == 48


def test_keys_hold_what_was_sent(server, tmp_path):
    """Without temperature and seed, greedy and sampled answers are the same request."""
    server.fault = refuse("temperature", "seed")
    greedy = predict(server.llm())
    sample(server.llm())  # learns that the seed is refused
    server.fault, server.asked = None, []
    for temperature in (0.3, 0.7, 0.0):
        assert sample(server.llm(), [0], temperature)[0] == greedy
    assert not server.asked
    next(tmp_path.rglob("servers.json")).unlink()
    predict(server.llm())  # an answer without temperature is not a greedy one
    assert [sent["temperature"] for sent in server.asked] == [0]


TOO_LONG = "'max_completion_tokens' is too large: 48. This model's maximum context length is 64"
FAULTS = [(200, reply) for reply in (
    reply_of("", finish_reason="length"), reply_of("5", finish_reason="error"), reply_of(5),
    reply_of("5", finish_reason="ABORT"), reply_of("5", finish_reason="content_filter"),
    reply_of("5", message=None), reply_of("5", message="5"), reply_of([None]), {"choices": []},
    {"choices": [None]}, {"error": {"message": "no, THE KEY"}}, [], "<p>" + "THE KEY" * 20,
    "{broken", "null", '"THE KEY"')]
FAULTS += [(403, {"error": {"message": "moderated"}}), (400, {"error": "not for THE KEY"}),
           (400, {"error": {"message": TOO_LONG}}), (422, {"detail": "too long, THE KEY"})]


@pytest.mark.parametrize(("status", "reply"), FAULTS)
def test_a_question_that_fails(server, capsys, status, reply):
    """The run goes on. Only this output is generated again by the next start."""
    server.fault = lambda _, body: "picked 9" in str(body) and (status, reply)
    outputs = predict(server.llm(), 7, 9, 8)
    assert [bool(output["failed"]) for output in outputs] == [False, True, False]
    assert not outputs[1]["finished"] and outputs[1]["answer"] is None
    assert KEY[:9] not in str(outputs) and "refuses" not in capsys.readouterr().out
    server.fault, server.asked = None, []
    assert [output["answer"] for output in predict(server.llm(), 7, 9, 8)] == ["5"] * 3
    assert len(server.asked) == 1


def test_twenty_failures_in_a_row_end_the_run(server):
    """Fewer failures do not, nor a success between them. What was finished is cached."""
    server.fault = lambda _, body: "picked 1" in str(body) and (503, "busy, THE KEY")
    llm = server.llm()
    for numbers in (range(100, 119), [2], range(100, 119), [3]):
        assert len(predict(llm, *numbers)) == len(numbers)
    with pytest.raises(art.UserError, match="20 .* in a row .*busy") as error:
        predict(llm, *range(100, 120))
    assert "\n" not in str(error.value) and KEY not in str(error.value)
    server.fault, server.asked = None, []
    predict(server.llm(), 2, 3, 100)
    assert len(server.asked) == 1


def test_what_never_works_ends_in_one_line(server, copy):
    def line(*flags, url=server.url):
        return copy.refused("sample", "--base-url", url, *flags)
    for status in (401, 404):
        server.fault = lambda *_, status=status: (status, {"detail": "not THE KEY"})
        said = line("--model", "x")
        assert re.search("not .*Check --base-url.*OPENAI_API_KEY", said) and KEY not in said
    assert "Check --base-url" in line("--model", "x", url="http://127.0.0.1:9")  # no connection
    assert "--model NAME" in line()
    copy.monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in line("--model", "x")


def test_all_scripts_take_a_server(server, copy):
    """Later scripts read the address in llm.json. One test question fails in all steps."""
    failing = art.read_jsonl(copy.data / "toy/test.jsonl", "")[-1]["question"]
    server.fault = lambda _, body: failing in str(body) and (403, {})
    server.texts["cot"], server.tokens = "half a character: \ud800\n#### 5\n", ()
    for url in (server.url, server.url + "/"):  # the same server
        server.asked = []
        copy("sample", "--base-url", url, "--model", "x", "--k", "1")
    assert copy.printed().count("gives no log-probabilities") == 1 and not server.asked
    copy("evaluate", "--threshold", "0")
    assert "Incorrect because failed: draft 1" in copy.printed()
    server.fault = None
    copy("evaluate", "--threshold", "0")
    asked = asked_of(copy.printed())
    assert (asked["draft"], asked["ask_self"], copy.results()["draft"]["failed"]) == (1, 1, 0)
    copy("solve", RECORD["question"])
    assert "answer: 5" in copy.printed()
