"""First time on a GPU: what the kit claims about cards, measured in one go, in ten minutes, without a network.

    python tests/gpu_accept.py --out DIR           # each piece is a process of its own, with a limit
    python tests/gpu_accept.py --out DIR --tiny    # the same code with tiny shapes in one process, on a CPU as well

Writes DIR/<piece>.json behind each piece, and DIR/table.md at the end. Exit code 1: something is not as it should be.
Random weights of the presets' real shapes go through the kit's own loading, training and generation, in the number
format of the card that a preset is for, and with no more memory than that card has.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fit
from shapes import device, random_tokens, use_random_models

import art

CAPS = {"t4": ("float16", 14.5), "16gb": ("bfloat16", 14.5), "24gb": ("bfloat16", 23.5)}  # GiB that a program gets


# --- Tools


def clock():
    """Seconds, when all that was started on the device is done."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work):
    """Seconds of one run."""
    began = clock()
    work()
    return clock() - began


def usual_seconds_of(work):
    """The median of five runs behind one that warms up."""
    work()
    return sorted(seconds_of(work) for _ in range(5))[2]


def busy_seconds(work):
    """Seconds in which the GPU computed; None on a CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6


def error_of(made, exact):
    """Relative error of a tensor."""
    return float((made.double() - exact).norm() / exact.norm())


def set_cap(gib):
    """Give this process so much memory of the card, and count its peak from here."""
    import torch
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole))
    art.reset_peak_memory()


def peaks():
    """GiB of tensors, and GiB that torch took from the card for them."""
    import torch
    if not torch.cuda.is_available():
        return {}
    return {"GiB": torch.cuda.max_memory_allocated() / 2**30, "GiB reserved": torch.cuda.max_memory_reserved() / 2**30}


# --- Pieces. Each gives {what: figure}; "ok": False means that something is not as it should be.


def machine(tiny):
    """Versions, the card, and what it multiplies, copies and starts a second."""
    import torch
    made = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}
    made |= {"card": device(), "format": str(art.compute_dtype(4))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        made |= {"card": card.name, "card GiB": card.total_memory / 2**30, "sm": f"{card.major}.{card.minor}"}
    size, amount = (128, 1 << 16) if tiny else (8192, 1 << 28)
    for name in ("bfloat16", "float16"):
        a = torch.randn(size, size, device=device()).to(getattr(torch, name))
        made[f"TFLOP/s {name}"] = 2 * size**3 / usual_seconds_of(lambda a=a: a @ a) / 1e12
    x = torch.ones(amount, device=device())
    made["copy GB/s"] = 8 * amount / usual_seconds_of(x.clone) / 1e9
    small = torch.ones(8, device=device())
    made["us a launch"] = usual_seconds_of(lambda: [small + 1 for _ in range(1000)]) * 1e3
    return made


def attention(tiny):
    """One step of attention as transformers runs it, in 16 bits, against float64; keys as large as Qwen2's."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    rows, heads, groups, width, length = (2, 2, 2, 16, 29) if tiny else (16, 4, 7, 128, 700)
    module, made = Namespace(num_key_value_groups=groups, is_causal=True), {}
    for name in ("bfloat16", "float16"):
        for largest in (0, 1500):  # of q·k behind its scaling
            torch.manual_seed(0)
            common = torch.randn(width, device=device())
            q = torch.randn(rows, heads * groups, 1, width, device=device()) + 3 * common * bool(largest)
            k = torch.randn(rows, heads, length, width, device=device())
            k = k + common / common.norm()**2 / 3 * largest * width**0.5
            v = torch.randn_like(k)
            q, k, v = (x.to(getattr(torch, name)) for x in (q, k, v))
            mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device())
            mask[0, :, :, :3] = False
            wide = (x.double().repeat_interleave(groups, 1) for x in (k, v))
            exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, mask).transpose(1, 2)
            error = error_of(sdpa_attention_forward(module, q, k, v, mask)[0], exact)
            made[f"{name}, q·k to {largest}"] = {"error": error, "ok": error < 0.01}
    return made


def masked(tiny):
    """Attention on batches padded on the left, forward and backward: is anything not finite?"""
    import torch
    torch.backends.cuda.enable_cudnn_sdp(False)  # as load_base does
    made = {}
    for name in ("bfloat16", "float16"):
        bad = []
        for length in (17, 32) if tiny else (64, 100, 192, 200, 255, 320, 512):
            for far in (0, 10):  # 10: q·k about -200, where cuDNN's backward gave NaN
                torch.manual_seed(length)
                q, k, v = ((torch.randn(4, 4, length, 128, device=device()) + part).to(getattr(torch, name))
                           .requires_grad_() for part in (far, -2 * far, 0))
                begins = torch.tensor([[0], [3], [length // 2], [length - 2]], device=device())
                seen = torch.arange(length, device=device())[None] >= begins
                mask = seen[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=device()).tril()
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
                out = out[seen[:, None, :].expand(-1, 4, -1)]
                out.float().sum().backward()
                if not all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad)):
                    bad.append(f"{length} {'far' * bool(far)}")
        made[name] = {"not finite at": ", ".join(bad) or "none", "ok": not bad}
    return made


def products(tiny):
    """4-bit products of bitsandbytes against those of the same weight in 16 bits, by rows."""
    import bitsandbytes as bnb
    import torch
    made, shapes = {}, {"tiny": (192, 64)} if tiny else {
        "1.5B gate": (8960, 1536), "7B down": (3584, 18944), "13B gate": (13824, 5120)}
    for name, (out, size) in shapes.items():
        layer = bnb.nn.Linear4bit(size, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer = layer.to(torch.bfloat16).to(device())
        layer(torch.zeros(1, size, device=device(), dtype=torch.bfloat16))  # a CPU quantises only here
        full = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for rows in (1, 3) if tiny else (1, 46, 226, 2048):
            x = torch.randn(rows, size, device=device(), dtype=torch.bfloat16)
            with torch.inference_mode():
                error = error_of(layer(x), x.double() @ full.double().T)
                made[f"{name} x {rows}"] = {
                    "error": error, "ok": error < 0.01, "us in 4 bits": 1e6 * usual_seconds_of(lambda: layer(x)),  # noqa: B023
                    "us in 16": 1e6 * usual_seconds_of(lambda: x @ full.T)}  # noqa: B023
    return made


def toy(tiny, dtype):
    """The five commands in 4 bits; the Asker's training is killed behind a checkpoint and goes on."""
    folder, made = Path(tempfile.mkdtemp()), {}
    sizes = ["--train", "40", "--dev", "12", "--test", "12"] if tiny else ["--train", "400", "--dev", "100",
                                                                           "--test", "100"]
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, art; name = sys.argv[1]\n"
            f"if torch.cuda.is_available(): art.compute_dtype = lambda bits, compute='auto': torch.{dtype}\n"
            "module = art if name == 'art' else __import__(name); sys.argv = sys.argv[1:]; art.run(module.main)")

    def start(name, *words):
        command = [sys.executable, "-c", code, name, *words, "--data", f"{folder}/data", "--runs", f"{folder}/runs"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    def note(name, process):
        began, said = time.time(), process.communicate()[0]
        made[name] = {"s": time.time() - began, "ok": process.returncode == 0} | (
            {"end": said[-300:]} if process.returncode else {})

    subprocess.run([sys.executable, "data/toy/prepare.py", *sizes, "--out", folder / "data/toy"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    note("sample", start("art", "sample"))
    asker = start("train_asker", "--save-steps", "1")
    while asker.poll() is None and not art.last_checkpoint(folder / "runs/toy/default/finetuned/checkpoints"):
        time.sleep(0.05)
    asker.kill()
    asker.communicate()
    note("train_asker, killed and resumed", start("train_asker", "--save-steps", "1"))
    note("train_truster", start("train_truster"))
    note("evaluate", start("evaluate"))
    about = folder / "runs/toy/default/finetuned/args.json"
    resumed = json.loads(about.read_text())["resumed_at"] if made["evaluate"]["ok"] else 0
    return {**made, "resumed at step": resumed, "ok": resumed > 0}


def write_answers(local, tiny, new):
    """Figures of one full batch of `Local.generate`, every row to the cap: what a batch needs at the most."""
    import torch
    prompt, cap = (8, 6) if tiny else (fit.PROMPT, new)
    rows = 2 if tiny else local.budget // (fit.PROMPT + fit.CAP)
    batch = [(str(i), random_tokens(prompt, tiny), [0]) for i in range(rows)]
    local.ends, local.shared, local.prefix = set(), [], None

    def write(count):
        with torch.inference_mode():
            made = local.generate(batch, {"max_new_tokens": count, "stop": None, "temperature": 0.7})
        return sum(row["tokens"] for row in made.values())

    whole_rows = write(2) == 2 * rows  # else some gave numbers that are not finite; it warms up, too
    short, whole = seconds_of(lambda: write(1)), seconds_of(lambda: write(cap))
    step = (whole - short) / (cap - 1)
    made = {"rows": rows, "ms a step": 1e3 * step, "tokens/s": rows / step, "ok": whole_rows}
    if device() == "cuda":
        computed = (busy_seconds(lambda: write(11)) - busy_seconds(lambda: write(1))) / 10
        made["share bound by launches"] = max(0.0, 1 - computed / step)
    return made


def llm(tiny, preset):
    """The LLM of a preset writes a full batch."""
    dtype, gib = CAPS[preset]
    use_random_models(dtype, tiny)
    set_cap(gib)
    local = art.Local(art.PRESETS[preset]["model"], 4, art.PRESETS[preset]["kv_gib"])
    return {**write_answers(local, tiny, fit.CAP), **peaks()}


def training(tiny, preset, kind):
    """An Asker or Truster: steps at the longest length, then the adapter is loaded and asked."""
    import torch

    import train_asker
    import train_truster
    sizes, (dtype, gib) = art.PRESETS[preset], CAPS[preset]
    use_random_models(dtype, tiny)
    set_cap(gib)
    name, batch, length = sizes[f"{kind}_model"], sizes[f"{kind}_batch"][0], 24 if tiny else sizes["max_length"]
    module, k, starts = (train_asker, 1, []) if kind == "asker" else (train_truster, sizes["k"], [])

    def example():
        rows = [random_tokens(length, tiny) for _ in range(k)]
        more = {"rows": rows, "correct": [i % 2 == 0 for i in range(k)]} if kind == "truster" else {
            "target": length // 2, "weight": 1.0}
        return {"input_ids": rows[0], **more}

    def loss(model, inputs):
        starts.append(clock())
        return module.loss(model, inputs)

    model = art.load_scorer(name, 4) if kind == "truster" else art.load_base(name, 4)
    model = art.add_lora(model, "SEQ_CLS" if kind == "truster" else "CAUSAL_LM", 16)
    args = Namespace(lr=2e-4, batch_size=batch, accumulate=1, seed=0, save_steps=1000, report_to="none")
    with tempfile.TemporaryDirectory() as folder:
        examples = [example() for _ in range(5 * batch)]
        art.fine_tune(model, examples, module.make_collate(0), loss, args, Path(folder), 1)
        rate = 3 * batch * k * length / (starts[4] - starts[1])
        made = {"training": {"rows": batch * k, "length": length, "tokens/s": rate, **peaks()}}
        del model
        set_cap(gib)
        local = art.Local(name, 4, sizes["kv_gib"], folder, scorer=kind == "truster")
    length = 16 if tiny else fit.PROMPT + fit.ANSWER + fit.ASKED
    rows = 2 if tiny else local.reads // length
    batch, local.shared, local.prefix = [("", random_tokens(length, tiny), [0])] * rows, [], None
    with torch.inference_mode():
        if kind == "truster":
            seconds = usual_seconds_of(lambda: local.score(batch, {}))
        else:
            seconds = usual_seconds_of(lambda: local.read(batch, local.base.base_model))
    made["reading"] = {"rows": rows, "tokens/s": rows * length / seconds, **peaks()}
    if kind == "asker":
        made["writing"] = {**write_answers(local, tiny, fit.ASKED), **peaks()}
    return made


PIECES = {  # in order of what is wanted most: the function, its arguments, the seconds it may take
    "machine": (machine, {}, 60), "attention": (attention, {}, 60), "masked": (masked, {}, 60),
    "products": (products, {}, 60), "toy-bf16": (toy, {"dtype": "bfloat16"}, 150),
    "t4-llm": (llm, {"preset": "t4"}, 90), "24gb-llm": (llm, {"preset": "24gb"}, 90),
    "24gb-truster": (training, {"preset": "24gb", "kind": "truster"}, 90),
    "24gb-asker": (training, {"preset": "24gb", "kind": "asker"}, 90),
    "t4-asker": (training, {"preset": "t4", "kind": "asker"}, 60),
    "t4-truster": (training, {"preset": "t4", "kind": "truster"}, 60),
    "toy-fp16": (toy, {"dtype": "float16"}, 120),
    "16gb-llm": (llm, {"preset": "16gb"}, 90), "16gb-asker": (training, {"preset": "16gb", "kind": "asker"}, 90),
    "16gb-truster": (training, {"preset": "16gb", "kind": "truster"}, 90),
}


# --- What calls them


def do(name, out, tiny):
    """Do one piece here and write what it gives."""
    function, how, _ = PIECES[name]
    began = time.time()
    try:
        made = function(tiny, **how)
    except (RuntimeError, art.UserError) as error:
        made = {"ok": False, "error": str(error)[:300]}
    art.write(out / f"{name}.json", {**made, "seconds": round(time.time() - began, 1)})


def do_apart(name, out, limit):
    """Do one piece in a process of its own; one that takes longer than `limit` seconds or dies is not ok."""
    began, path = time.time(), out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(out), "--piece", name]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=limit).stderr[-1000:]
    except subprocess.TimeoutExpired:
        said = f"it takes longer than {limit:.0f} s"
    if not path.is_file():
        art.write(path, {"ok": False, "error": said, "seconds": round(time.time() - began, 1)})


def flat(value, name=""):
    """(name, figure) of all that a piece gave."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, part in value.items() for leaf in flat(part, f"{name} {key}".strip())]


class Measured:
    """Hours as fit.hours wants them, from the speeds that were measured here."""

    def __init__(self, preset, made):
        self.llm, self.asker, self.truster = (made[f"{preset}-{kind}"] for kind in ("llm", "asker", "truster"))

    def writing(self, name, answers, length=fit.ANSWER, adapter=False):
        speed = (self.asker["writing"] if adapter else self.llm)["tokens/s"]
        return answers * length / speed / fit.ALIVE / 3600

    def reading(self, name, tokens, kind):
        return tokens / getattr(self, kind)["reading"]["tokens/s"] / 3600

    def training(self, name, tokens, kind):
        return tokens / getattr(self, kind)["training"]["tokens/s"] / 3600


def table(out):
    """(all figures and the hours as Markdown, what is not ok)."""
    made = {name: json.loads((out / f"{name}.json").read_text()) for name in PIECES if (out / f"{name}.json").is_file()}
    lines = ["| piece | what | measured |", "| --- | --- | --- |"]
    for piece, figures in made.items():
        for name, value in flat(figures):
            text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
            lines.append(f"| {piece} | {name} | {text} |")
    lines += ["", "Hours on this card, for the five steps on GSM8K:", ""]
    whole = {name for name, figures in made.items() if "error" not in figures}
    for preset in CAPS:
        if {f"{preset}-{kind}" for kind in ("llm", "asker", "truster")} <= whole:
            steps = fit.hours(art.PRESETS[preset], Measured(preset, made))
            lines.append(f"- `{preset}`: " + ", ".join(f"{step} {value:.2g}" for step, value in steps.items())
                         + f"; sum {sum(steps.values()):.2g}")
    wrong = [f"{piece} {name}" for piece, figures in made.items() for name, value in flat(figures)
             if name.split(" ")[-1] == "ok" and value is False]
    return "\n".join(lines) + "\n", wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, all in this process")
    parser.add_argument("--piece", choices=PIECES, help="only this piece, in this process")
    args = parser.parse_args()
    if args.piece:
        return do(args.piece, args.out, args.tiny)
    end = time.time() + 580
    for name in PIECES:
        left = end - time.time()
        if args.tiny and name != "toy-fp16":  # on a CPU the same as toy-bf16
            do(name, args.out, tiny=True)
        elif not args.tiny and left > 15:
            do_apart(name, args.out, min(left, PIECES[name][2]))
        print(f"{name}: done, {left:.0f} s were left", flush=True)
    text, wrong = table(args.out)
    (args.out / "table.md").write_text(text, "utf-8")
    undone = [name for name in PIECES if not (args.out / f"{name}.json").is_file()]
    print(f"{text}\nnot ok: {'; '.join(wrong) or 'nothing'}; not done: {', '.join(undone) or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
