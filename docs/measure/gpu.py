"""Measure the kit on a GPU: one command, at most five minutes, nothing is downloaded.

    python docs/measure/gpu.py                   # all pieces, the most important ones first
    python docs/measure/gpu.py loop-4 static     # some pieces
    python docs/measure/gpu.py --tiny            # tiny shapes, also on a CPU: does the script work?

toy: the toy's five commands; one training is killed and resumed. PRESET-ROLE: peak memory and speed
of a preset's models at their real shapes, with random weights and no more memory than the preset's
card has. loop: a 1.5B model writes with the kit's loop; graph: a step is captured as a CUDA graph;
static: transformers' `generate` with a static cache. Each piece is a process of its own with a time
limit. Its rows go to DIR/gpu.jsonl at once. An error is a row, too, and makes the exit code 1.
"""

import argparse
import contextlib
import io
import json
import math
import random
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers
from bitsandbytes.nn import Params4bit
from transformers.integrations import replace_with_bnb_linear

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import memory
from speed import clock

import art
import train_asker
import train_truster

CUDA, TINY = torch.cuda.is_available(), "--tiny" in sys.argv
DEVICE, GIB = "cuda" if CUDA else "cpu", 2**30
LENGTH = 24 if TINY else 512  # tokens of a training example
QUESTION, CAP = (16, 32) if TINY else (memory.QUESTION, memory.CAP)  # tokens: a prompt, an answer
ROWS, NEW = ((2, 3), 8) if TINY else ((256, 1024, 2048), 128)  # of loop, graph and static
STOP = art.ANSWER_LINE["number"] + r"[^\n]*\n"  # the kit searches for it after each token
COMPUTED = {  # GiB, by the functions of docs/measure/memory.py for the same rows and lengths
    "24gb-truster training": 11.3, "24gb-truster scoring": 10.0, "24gb-asker training": 6.5,
    "24gb-asker asking": 13.9, "24gb-llm writing": 10.1, "t4-truster training": 2.4,
    "t4-truster scoring": 3.0, "t4-asker training": 5.2, "t4-asker asking": 6.2,
    "t4-llm writing": 6.2, "16gb-truster training": 4.8, "16gb-truster scoring": 4.8,
    "16gb-asker training": 7.2, "16gb-asker asking": 6.9, "16gb-llm writing": 9.5}
COLUMNS = ["piece", "what", "rows", "GiB", "GiB reserved", "GiB computed", "tokens/s",
           "waiting for launches", "seconds", "note", "error"]
MOST = {"24gb-truster training": 11.5, "24gb-asker training": 7.0}  # GiB; more is an error


def random_model(kind, name, dtype, quantization_config=None, **_):
    """Used in place of art.from_pretrained. Weights are made and quantised one after the other."""
    with accelerate.init_empty_weights(include_buffers=False):
        model = memory.make_model(name, dtype, scorer=kind.endswith("SequenceClassification"))
    if quantization_config:
        replace_with_bnb_linear(model, ["lm_head", "score"], quantization_config)
    for place, value in [*model.named_parameters(), *model.named_buffers()]:
        layer, _, key = place.rpartition(".")
        if value.is_meta:  # norms and biases are about 1
            full = torch.randn(value.shape, dtype=dtype, device=DEVICE) * 0.02 + (value.ndim == 1)
            value = (Params4bit(full, **vars(value)) if isinstance(value, Params4bit)
                     else torch.nn.Parameter(full))
        setattr(model.get_submodule(layer), key, value.to(DEVICE))
    model.tie_weights()
    model.is_loaded_in_4bit = bool(quantization_config)  # peft reads it
    return model


def use_random_models(preset):
    """Let the kit load random weights, with the toy's tokenizer and the memory of a card."""
    tokenizer = art.load_tokenizer(art.TOY)
    art.load_tokenizer, art.from_pretrained, art.weights_id = lambda _: tokenizer, random_model, str
    if TINY:
        for name, (family, *_, tied) in memory.SHAPES.items():
            memory.SHAPES[name] = ({**family, "vocab_size": 1000}, 64, 192, 2, 4, 2, tied)
    if CUDA and preset:
        free = memory.FREE[preset] * GIB
        share = free / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        torch.cuda.mem_get_info = lambda *_: (free - torch.cuda.memory_allocated(), free)


def rows_of(count, length):
    """Random texts for art.Local. Their lengths differ, so there is padding as in real data."""
    return [{"prompt": random.choices(range(5, 500), k=length - place % 7), "start": "",
             "ids": [], "logprob": 0.0, "random": random.Random(place)} for place in range(count)]


def seconds(work, *words, **settings):
    """Seconds of `work(*words, **settings)`."""
    began = clock()
    work(*words, **settings)
    return clock() - began


def busy(work, *words):
    """Seconds in which the GPU computes during `work(*words)`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        seconds(work, *words)
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6


def script(half, *words):
    """Run a script of the kit in this process; "fp16": as on a card without bf16."""
    if half == "fp16":
        torch.cuda.is_bf16_supported = lambda *args, **settings: False
    sys.argv = [str(word) for word in words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(art.ROOT / words[0]), run_name="__main__")
    return out.getvalue()


def toy(folder, half):
    """The five commands. The Asker's training is killed after a checkpoint, and resumed."""
    train, dev, test = (40, 12, 12) if TINY else (600, 150, 200)
    run, where = folder / "runs/toy/default", ["--runs", folder / "runs", "--data", folder / "data"]
    script(half, "data/toy/prepare.py", "--train", train, "--dev", dev, "--test", test,
           "--out", folder / "data/toy")
    script(half, "data/sample.py", *where)
    words = [half, "train_asker.py", *map(str, where), "--save-steps", "1"]
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import gpu; gpu.script(*{words!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (run / "asker/checkpoint.pt").is_file():
            time.sleep(0.02)
        process.kill()
    said = script(half, "train_asker.py", *where)
    [resumed] = [line for line in said.splitlines() if line.startswith("resuming at step")]
    script(half, "train_truster.py", *where)
    script(half, "evaluate.py", *where)
    rows = {row["row"]: row["accuracy"] for row in art.read_json(run / "results.json")["rows"]}
    yield {"what": f"five commands, {art.load_base(art.TOY, 16).dtype}",
           "note": f"draft {rows['draft']:.1%}, art {rows['art']:.1%}, {resumed}"}


@torch.inference_mode()
def loop(local, count, prompt, new):
    """A row: how fast Local.write is, without the reading of prompts. No count: all that fit."""
    def work(tokens):
        settings = {"max_new_tokens": tokens, "stop": STOP, "temperature": 0.7}
        outputs = local.write(rows_of(count, prompt), settings)
        assert all(math.isfinite(output["logprob"]) for output in outputs), "not finite"

    count = count or (2 if TINY else local.token_budget() // (prompt + new))
    work(2)  # warms up
    short, long = seconds(work, 2), seconds(work, new)
    row = {"what": "writing", "rows": count, "tokens/s": round(count * (new - 2) / (long - short))}
    if CUDA:
        share = (busy(work, 18) - busy(work, 2)) / (seconds(work, 18) - short)
        row["waiting for launches"] = round(1 - share, 2)
    return row


@torch.inference_mode()
def graph(local, count, prompt, new):
    """A row: a step on a static cache, captured as a CUDA graph; the kit chooses the tokens."""
    rows = rows_of(count, prompt)
    inputs = local.pad(rows)
    cache = transformers.StaticCache(config=local.base.config, max_cache_len=prompt + new)
    local.model(**inputs, past_key_values=cache)
    tokens, place = inputs["input_ids"][:, -1:].clone(), inputs["position_ids"][:, -1:] + 1
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, new)).bool()[:, None, None]

    def forward():
        return local.model(input_ids=tokens, attention_mask=seen, position_ids=place,
                           past_key_values=cache, use_cache=True).logits

    out = forward()  # warms up
    if CUDA:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = forward()
    for layer in cache.layers:  # the next step writes to the same place again
        layer.cumulative_length.fill_(prompt)

    def step(number):
        seen[..., prompt + number] = True
        captured.replay() if CUDA else out.copy_(forward())
        logits = out[:, -1].float()
        tokens.copy_(local.pick(logits, rows, 0.7)[:, None])
        local.note(rows, tokens[:, 0], logits, STOP)
        place.add_(1)

    step(0)
    speed = round(count * (new - 1) / seconds(lambda: [step(number) for number in range(1, new)]))
    return {"what": "writing" + " without a graph" * (not CUDA), "rows": count, "tokens/s": speed}


def static(local, count, prompt, new):
    """A row: transformers' `generate` with a static cache, which it compiles on a GPU."""
    inputs, times = local.pad(rows_of(count, prompt)), []
    del inputs["position_ids"], inputs["logits_to_keep"]
    settings = {**inputs, "max_new_tokens": new, "cache_implementation": "static", "top_k": 0,
                "do_sample": True, "temperature": 0.7, "pad_token_id": 0,
                "logits_processor": [lambda _, scores: times.append(clock()) or scores]}
    first, _ = (seconds(local.base.generate, **settings) for _ in range(2))
    return {"what": "writing", "rows": count, "note": f"the first run took {first:.0f} s",
            "tokens/s": round(count * (new - 2) / (times[-1] - times[new + 1]))}


def llm(folder, preset, bits, work=loop, counts=()):
    """A preset's LLM writes batches of `counts` rows; without: one full batch of whole answers."""
    use_random_models(None if counts else preset)
    args = argparse.Namespace(shared=folder, kv_gib=None)
    local = art.Local(args, art.PRESETS[preset]["model"], bits)
    local.load()
    for count in counts or [None]:
        yield work(local, count, QUESTION, NEW if count else CAP)


def adapter(folder, preset, role):
    """An Asker or a Truster is trained with twice the preset's examples; then it is asked."""
    use_random_models(preset)
    sizes, scorer = art.DEFAULTS | art.PRESETS[preset], role == "truster"
    name, at_once, k = sizes[f"{role}_model"], 2 * sizes[f"{role}_at_once"], sizes["k"]
    module, rows = (train_truster, at_once * k) if scorer else (train_asker, at_once)
    texts = [row["prompt"] for row in rows_of(6 * at_once * k, LENGTH)]
    examples = [{"rows": texts[i * k: i * k + k], "correct": [True] + [False] * (k - 1),
                 "input_ids": texts[i], "target": LENGTH // 2, "decision": LENGTH // 2 - 2,
                 "weight": 1.0} for i in range(6 * at_once)]
    starts, args = [], argparse.Namespace(shared=folder, kv_gib=None, seed=0, lr=2e-4,
                                          save_steps=100, report_to=None)
    model = art.add_lora(art.load_base(name, 4, scorer), "SEQ_CLS" if scorer else "CAUSAL_LM", 16)
    art.fine_tune(  # 3 steps; the second one is timed
        model, examples, lambda chosen: module.collate(0, chosen),
        lambda *inputs: starts.append(clock()) or module.loss(*inputs),
        args, folder, 2 * at_once, at_once, epochs=1)
    speed = round(2 * rows * LENGTH / (starts[4] - starts[2]))
    yield {"what": "training", "rows": rows, "tokens/s": speed}
    del model
    local, settings = art.Local(args, name, 4, folder, scorer), {"options": (" Yes", " No")}
    local.load()
    read, length, new = local.rate, QUESTION + CAP, CAP // 8
    if not scorer:
        read, length = local.decide, QUESTION + 2 * CAP
        row = loop(local, None, length - new, new)
    texts = rows_of(2 if TINY else 16_384 // length, length)
    with torch.inference_mode():
        read(texts, settings)  # warms up
        speed = round(len(texts) * length / seconds(read, texts, settings))
    if scorer:
        yield {"what": "scoring", "rows": len(texts), "tokens/s": speed}
    else:
        yield {**row, "what": "asking", "note": f"decides on {speed:,} tokens/s"}


PIECES = {  # the most important ones first: the seconds a piece may take, a function, its arguments
    "toy-bf16": (90, toy, "bf16"), "24gb-truster": (90, adapter, "24gb", "truster"),
    "24gb-asker": (90, adapter, "24gb", "asker"), "24gb-llm": (90, llm, "24gb", 4),
    "loop-16": (90, llm, "t4", 16, loop, ROWS), "toy-fp16": (90, toy, "fp16"),
    "loop-4": (90, llm, "t4", 4, loop, ROWS), "graph-16": (60, llm, "t4", 16, graph, ROWS[:2]),
    "t4-llm": (60, llm, "t4", 16), "static": (150, llm, "t4", 16, static, ROWS[:1]),
    "graph-4": (60, llm, "t4", 4, graph, ROWS[:2]), "16gb-llm": (90, llm, "16gb", 4),
    **{f"{preset}-{role}": (60, adapter, preset, role)
       for preset in ("t4", "16gb") for role in ("asker", "truster")}}


def save(path, row):
    """Print a row, and add it to the file."""
    with path.open("a", encoding="utf-8") as file:
        for out in (file, sys.__stdout__):
            print(json.dumps(row), file=out, flush=True)


def run_here(path, name):
    """Do a piece in this process."""
    (_, function, *words), began = PIECES[name], time.time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for row in function(Path(folder), *words):
            key, row = f"{name} {row['what']}", {"piece": name, **row}
            row |= {"GiB computed": COMPUTED.get(key, ""), "seconds": round(time.time() - began)}
            if CUDA:
                row |= {"GiB": round(torch.cuda.max_memory_allocated() / GIB, 2),
                        "GiB reserved": round(torch.cuda.max_memory_reserved() / GIB, 2)}
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if row.get("GiB", 0) > MOST.get(key, math.inf):
                row["error"] = f"FAILED: more than {MOST[key]} GiB"
            save(path, row)


def run_apart(path, name, limit):
    """Do a piece in a process of its own; if it fails, save the last lines of its error."""
    command = [sys.executable, __file__, name, "--here", "--out", path.parent, *["--tiny"] * TINY]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, timeout=limit, errors="replace")
        code, lines = done.returncode, done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        code, lines = f"stopped after {limit:.0f} s", []
    if code:
        last = " / ".join(lines[-3:])[-400:].replace("|", "/")
        save(path, {"piece": name, "error": f"FAILED ({code}): {last}"})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, end = parser.add_argument, time.time() + (900 if TINY else 290)
    add("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}")
    add("--out", type=Path, default=art.ROOT / "runs/gpu", metavar="DIR", help="(runs/gpu)")
    add("--tiny", action="store_true", help="tiny shapes")
    add("--here", action="store_true", help="do one piece in this process")
    args = parser.parse_args()
    names, path = args.pieces or list(PIECES), args.out / "gpu.jsonl"
    if args.here:
        return run_here(path, *names)
    if unknown := {*names} - PIECES.keys():
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    reached = []
    for name in names:
        limit, left = PIECES[name][0], end - time.time()
        if left > limit / 2:
            rows = art.read_jsonl(path, "") if path.is_file() else []
            art.write(path, [row for row in rows if row["piece"] != name])
            run_apart(path, name, min(limit, left))
            reached.append(name)
    rows = art.read_jsonl(path, "") if path.is_file() else []
    rows = [row for row in rows if row["piece"] in reached]
    cells = [[str(row.get(key, "")) for key in COLUMNS] for row in rows]
    lines = [" | ".join(line) for line in [COLUMNS, ["---"] * len(COLUMNS), *cells]]
    print(f"\n{art.provenance()}\n", *[f"| {line} |" for line in lines], sep="\n")
    missing = " ".join(name for name in names if name not in reached)
    print(f"\nnot reached: {missing or 'none'}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
