"""ART: Ask, Refine, and Trust. The one shared module of the kit, in the order a record passes through it.

    question -> PREDICT -> initial -> ASK -> sub-questions + refine? -> REFINE -> refined -> TRUST -> final

    python art.py sample --task toy             # k predictions for every training question, and the drafts of dev
    python art.py subquestions                  # only where the data has none: the LLM's, for --subquestions generated
    python art.py solve --task toy "QUESTION"   # one question through the four steps

Source: Shridhar et al., "The ART of LLM Refinement: Ask, Refine, and Trust", arXiv 2311.07961.
"""

import argparse
import collections
import contextlib
import contextvars
import functools
import gc
import hashlib
import http.client
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for an optional package at each import

import filelock
import numpy as np
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOT = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # of this process under torchrun: all train, the first alone writes and prints


class UserError(Exception):
    """Something the user can mend; its text is the one line they see."""


class Refused(UserError):
    """What a server says of one request, as of a question that is too long."""


def run(main):
    """Call `main`; a UserError or a full disk becomes one line and exit code 2, Ctrl-C one line and 130, untraced."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # on Windows, into a file: an alphabet of 256
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    try:
        main()
    except UserError as error:
        tqdm.write(visible(f"error: {error}"), file=sys.stderr)  # on a line of its own, whatever progress is shown
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped: what was written is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # files and safetensors say what is wrong, torch only where (the last of these words)
        if not re.search("No space left|quota exceeded|File too large|inline_container", str(error)):
            raise
        tqdm.write("error: the disk is full, or a file at its size limit; what was written is kept: make room, and the "
                   "same command goes on from there", file=sys.stderr)
        sys.exit(2)


# --- Tasks and records. A new task is one entry here and one folder data/<task>/ with a prepare.py. ---

TASKS = {  # answer: how it is read; prepare: the command that makes the data; exemplars: whose exemplars.jsonl is used
    "toy": {"answer": "number", "prepare": "data/toy/prepare.py", "exemplars": "toy"},
    "gsm8k": {"answer": "number", "prepare": "data/gsm8k/prepare.py", "exemplars": "gsm8k"},
    "gsm8k-offline": {"answer": "number", "prepare": "data/gsm8k/prepare.py --offline-split 1000",
                      "exemplars": "gsm8k"},
    "strategyqa": {"answer": "yes/no", "prepare": "data/strategyqa/prepare.py", "exemplars": "strategyqa"},
}


def load_task(task, split, limit=None, data=ROOT / "data"):
    """Records of data/<task>/<split>.jsonl, the first `limit` of them. Split: train, dev or test."""
    path = Path(data) / task / f"{split}.jsonl"
    records = read_jsonl(path, f"make it with: python {TASKS[task]['prepare']}")[:limit]
    if not records:
        raise UserError(f"{path} is empty; make it again with: python {TASKS[task]['prepare']}")
    for number, record in enumerate(records, 1):
        if missing := {"id", "question", "answer"} - record.keys():
            raise UserError(f"{path}, line {number}: no {', '.join(sorted(missing))} in this record")
        if not re.fullmatch(GOLD[TASKS[task]["answer"]], str(record["answer"])):  # else a part might pass for it
            raise UserError(f"{path}, line {number}: the answer {record['answer']!r} is not a {TASKS[task]['answer']} "
                            "and nothing else; write it so")
    return records


def find_exemplars(task, data=ROOT / "data"):
    """exemplars.jsonl of a task: in its data folder, else the one that comes with the kit."""
    paths = [Path(folder) / TASKS[task]["exemplars"] / "exemplars.jsonl" for folder in (data, ROOT / "data")]
    return next((path for path in paths if path.is_file()), paths[-1])


def load_exemplars(task, shots, data=ROOT / "data"):
    """The first `shots` hand-written exemplars of a task (never items of its data), [] for none."""
    path = find_exemplars(task, data)
    exemplars = read_jsonl(path, "write some there, or run with --shots 0") if shots else []
    if len(exemplars) < shots:
        raise UserError(f"{path} has {len(exemplars)} exemplars: --shots is at most that")
    return exemplars[:shots]


def fetch(name, url, sha256, raw, files=None, hint=""):
    """Path of one raw data file, verified: the user's copy in `files`, or the one in `raw`, downloaded if need be."""
    path = Path(files or raw) / name
    if not path.is_file():
        if files:
            raise UserError(f"no file {path}; put it there, or leave out --files to download it{hint}")
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(60)  # torch sets none: a stalled download would hang
        try:  # its own name comes when it is whole and verified
            torch.hub.download_url_to_file(url + name, str(path), hash_prefix=sha256)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            raise UserError(f"cannot download {url}{name} ({error}); try again, or give --files DIR") from error
    elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        mend = f"replace it by {url}{name}" if files else "delete it and run again, or give a copy with --files DIR"
        raise UserError(f"{path}: wrong checksum; {mend}")
    return path


def write_splits(folder, task, train, test, dev_size, seed=0):
    """Carve dev from train, drop from train what stands in test, write the three splits and print their counts."""
    seen = {normalise(record["question"]) for record in test}
    kept = [record for record in train if normalise(record["question"]) not in seen]
    chosen = set(random.Random(seed).sample(range(len(kept)), dev_size))
    splits = {"train": [record for index, record in enumerate(kept) if index not in chosen],
              "dev": [{**kept[index], "id": kept[index]["id"].replace("-train-", "-dev-")} for index in sorted(chosen)],
              "test": test}
    assert not seen & {normalise(record["question"]) for name in ("train", "dev") for record in splits[name]}
    pairs = near_duplicates(splits["train"], splits["dev"] + test) + near_duplicates(splits["dev"], test)
    print(f"{len(train) - len(kept)} dropped from train, being in test; {len(pairs)} near duplicates stay:", *pairs[:5])
    for split, records in splits.items():
        write_jsonl(Path(folder) / task / f"{split}.jsonl", records)
        print(f"{Path(folder) / task / split}.jsonl: {len(records):,} questions")
    print(json.dumps(splits["train"][0], ensure_ascii=False))


def near_duplicates(records, others):
    """Pairs of ids whose questions share at least half of their runs of four words, all numbers alike."""
    def shingles(record):
        words = re.sub(r"\d+", "0", normalise(record["question"])).split()
        return {tuple(words[start : start + 4]) for start in range(len(words) - 3)}

    sets, where, pairs = [shingles(other) for other in others], {}, []
    for index, found in enumerate(sets):
        for shingle in found:
            where.setdefault(shingle, []).append(index)
    for record in records:
        mine = shingles(record)
        common = collections.Counter(index for shingle in mine for index in where.get(shingle, ()))
        pairs += [(record["id"], others[i]["id"]) for i, n in common.items() if 2 * n >= len(mine | sets[i])]
    return pairs


def normalise(text):
    """Text as it is compared when splits are checked for overlap.

    >>> normalise("How many  eggs are 2 + 3?")
    'how many eggs are 2 + 3'
    """
    return " ".join(re.findall(r"\w+|[+*/=<>^]", text.casefold()))


def read_jsonl(path, mend="", journal=False):
    """The records of a JSONL file. `journal`: a half-written last line (of a killed run) is cut off, with a warning."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; {mend}")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if journal and whole < len(content):
        print(f"warning: 1 half-written line dropped at the end of {path}", file=sys.stderr)
        with path.open("r+b") as file:
            file.truncate(whole)
        content = content[:whole]
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
                to_lines(records[-1:]).encode()  # half a character, as "\ud800", can be neither tokenized nor written
            except (ValueError, RecursionError):
                records.append(None)
            if not isinstance(records[-1], dict):
                raise UserError(f"{path}, line {number}: not a JSON object; mend or delete that line")
    return records


def write_text(path, text):
    """Write a file whole or not at all; under torchrun the first process alone."""
    if RANK:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    wrote()


WRITES = itertools.count(1)


def wrote():
    """Stands behind every write. For tests: ART_KILL_AFTER_WRITES=n kills the process behind its n-th."""
    if next(WRITES) == int(os.environ.get("ART_KILL_AFTER_WRITES", 0)):
        os.kill(os.getpid(), signal.SIGKILL)


def to_lines(records):
    """JSONL text of records."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(path, records):
    """Write a JSONL file whole or not at all."""
    write_text(path, to_lines(records))


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


# --- Answers: read from what a model wrote, compared as numbers or as yes/no; what cannot be read is None, never right

# What may stand before an answer: blanks, ** $ - " ( and LaTeX such as \boxed{\text{. The bounds keep it fast on junk.
_SKIP = r"(?!#)(?=[^\w\n#]{0,10}\w)[^\w\n#]{0,10}(?:\\[a-zA-Z]{1,9}[^\w\n#]{1,5}){0,2}"
_YES_NO = (r"((?i:yes|no|true|false))\b(?![-/]|(?i: or| and (?:yes|no)| one| longer| doubt| matter| idea| clue| way"
           r"| (?:definite |clear )?(?:information|evidence|data|record|answer))\b)")  # not: yes/no, no one, no idea
_PHRASE = r"\b(?i:answer(?: to (?:the|this) question)?\W{0,4}(?:is\b|:|=))"  # the answer is; **Answer:**; answer =
_WINDOW = 5000  # an answer line is read so far, and the fallbacks read so many last characters: junk costs no time
_HEAD = 100_000  # an answer line is looked for in so many first characters, then in the last ones

# The explicit answer line, `#### 18` or `#### yes`; not a heading as `#### Step 1: ...` or `#### 1. Find ...`.
ANSWER_LINE = {"number": "####" + _SKIP + r"(?![0-9][.):][ *]{1,3}[A-Za-z])[0-9]", "yes/no": "####" + _SKIP + _YES_NO}

_SIGN = r"((?:(?<![\w)\]}%$€£-])(?<![0-9)] )-)?(?:[$€£] ?-?)?)"  # - -$ $- $; not the - of 10-20, step-3, 16 -3
_DIGITS = r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"  # 1,000.50 or 12 or .5
_NUMBER = re.compile(  # not an exponent (m^2, m^{2}); sign; the 3 of 3 1/2; number; denominator
    r"(?<![0-9^])(?<!\^\{)" + _SIGN + r"(?:([0-9]+) (?=[0-9]+ ?/ ?[0-9]))?" + _DIGITS + "(?: ?/ ?" + _DIGITS + ")?"
)

GOLD = {"number": _NUMBER, "yes/no": "yes|no"}  # what a gold answer has to look like


def _plain(text):
    r"""LaTeX and Unicode made plain: `9{,}500` is 9,500 and `3\frac{1}{2}` is 3 1/2; other commands become a blank."""
    for old, new in [("−", "-"), ("–", "-"), ("{,}", ","), ("\\,", ","), ("\\!", ""), ("\\$", "$")]:
        text = text.replace(old, new)
    text = re.sub(r"(?<=[0-9])\\(?=[dt]?frac)", r" \\", text)
    text = re.sub(r"\\[dt]?frac\{([0-9.,]+)\}\{([0-9.,]+)\}", r"\1/\2", text)
    return re.sub(r"\\[a-zA-Z]{1,20}", " ", text)


def _number(text, last=False):
    """The first number of the first line (`9 * 2 = 18` counts as its result), or the last number of the text.

    >>> _number("$1,000.50 (see step 2)"), _number("9 * 2 = $18 a day"), _number("1/3 of 10", last=True), _number("1/0")
    ('1000.5', '18', '10', None)
    """
    text = _plain(text[:_WINDOW] if last else text[:_WINDOW].split("\n")[0])
    if last:
        found = ([None] + list(_NUMBER.finditer(text)))[-1]
    else:
        result = re.match(r"\W*[^A-Za-z(]*", text)[0].rpartition("=")[2]
        found = _NUMBER.search(result) or _NUMBER.search(text)
    if not found or len(found[0]) > 100:  # longer ones are runaway text, and Python refuses the longest
        return None
    sign, whole, number, below = ((part or "").replace(",", "") for part in found.groups())
    if below and Fraction(below) == 0:
        return None
    value = Fraction(whole or 0) + Fraction(number) / Fraction(below or 1)
    minus = "-" if "-" in sign and value else ""
    text = f"{minus}{value}"
    if 10**20 % value.denominator == 0:  # a decimal of up to 20 places, not as 1/3
        decimals = f"{int(value % 1 * 10**20):020}".rstrip("0")
        text = f"{minus}{int(value)}.{decimals}".rstrip(".")
    return text if len(text) <= 100 else None  # so that it reads as itself


def extract_answer(task, text):
    r"""The answer in a model's text, in canonical form, or None. The first `####` line wins: the rest is past the stop.

    Failing that, for a number: the last \boxed{}, the last "the answer is", the last number; for yes/no: the last "the
    answer is", or a text that opens with the bare word. Never a guess: "No one knows" and "I do not know" are None.

    >>> extract_answer("gsm8k", "9 * 2 = 18\n#### **$1,018.00**\n\nQuestion: 3"), extract_answer("gsm8k", "9 - 2 = 7.")
    ('1018', '7')
    >>> extract_answer("strategyqa", "So the answer is **No**."), extract_answer("strategyqa", "No one knows.")
    ('no', None)
    """
    text, kind = text or "", TASKS[task]["answer"]
    head, tail = text[:_HEAD], text[-_WINDOW:]  # a page of junk costs no time
    line = re.search(ANSWER_LINE[kind], head) or re.search(ANSWER_LINE[kind], tail)
    if kind == "number":
        if line:
            return _number(line.string[line.start() + 4 :])
        for marker in (r"\\boxed", _PHRASE):
            found = list(re.finditer(marker + "(?=" + _SKIP + "[0-9])", tail))
            if found:
                return _number(tail[found[-1].end() :])
        return _number(tail, last=True)
    words = [line[1]] if line else re.findall(rf"(?:{_PHRASE}|\\boxed)\s{{0,3}}{_SKIP}{_YES_NO}", tail)
    opening = re.match(rf"{_SKIP}{_YES_NO}(?=[^\S\n]*(?:[^\w\s]|\n|$))", text.strip()[:_WINDOW])
    word = words[-1] if words else opening[1] if opening else ""
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(word.lower())


def is_correct(task, text, gold):
    """Does the text's answer equal the gold one? No answer is wrong.

    >>> is_correct("gsm8k", "#### $1,000.00", "1000"), is_correct("gsm8k", "I do not know", "18")
    (True, False)
    """
    answer = extract_answer(task, text)
    return answer is not None and answer == extract_answer(task, f"#### {gold}")


def verdict(task, made, gold):
    """Is a generation right? One that was cut off is not, whatever its last number."""
    return made["stopped"] and is_correct(task, made["text"], gold)


# --- Prompts: what goes in, what comes out, for each of the four steps. Training, inference and toy use these.

PROMPT_VERSION = 2  # raise it with any change below or of how answers are read: what was made before is refused
DECISION = "Refine:"  # stands before the Asker's Yes or No


def question_block(record, facts=False):
    r"""The question as every prompt begins, with the supporting facts if asked for. No gold field is read but `facts`.

    >>> question_block({"question": "Is ice cold?", "facts": ["Ice is frozen."]}, facts=True)
    'Question: Is ice cold?\nFacts:\n- Ice is frozen.\n'
    """
    lines = [f"Question: {record['question']}"]
    if facts and record.get("facts"):
        lines += ["Facts:"] + [f"- {fact}" for fact in record["facts"]]
    return "\n".join(lines) + "\n"


def predict_prompt(record, strategy="cot", facts=False):
    """Step 1: chain of thought, or `decomp`: each line asks a sub-question and answers it (paper, section 3.1)."""
    return question_block(record, facts) + ("Answer:\n" if strategy == "cot" else "Answer by sub-questions:\n")


def solution_text(solution, answer, strategy="cot"):
    r"""The target of a prediction: one step a line, then `#### answer`. `solution` is [[sub-question, step], ...].

    >>> solution_text([["How many are left?", "5 - 2 = 3 are left."]], "3", "decomp")
    'How many are left? 5 - 2 = 3 are left.\n#### 3'
    """
    lines = [step if strategy == "cot" else f"{subquestion} {step}".strip() for subquestion, step in solution]
    return "\n".join([*filter(None, lines), f"#### {answer}"])


def ask_prompt(record, draft):
    """Step 2: question and draft; the answer to it is `ask_target`."""
    return f"{question_block(record)}Answer:\n{draft}\nSub-questions:\n"


def ask_target(subquestions, refine):
    r"""The sub-questions that the answer should have settled, one a line, then the decision.

    >>> ask_target(["How many are left?"], True)
    'How many are left?\nRefine: Yes'
    """
    return "\n".join([*subquestions, f"{DECISION} {'Yes' if refine else 'No'}"])


def refine_prompt(record, draft, subquestions=None, facts=False):
    """Step 3: question, draft and sub-questions (None: the ablation without them); the answer is a `solution_text`."""
    asked = "".join(line + "\n" for line in ["Sub-questions:", *subquestions]) if subquestions else ""
    return f"{question_block(record, facts)}Answer:\n{draft}\n{asked}Revised answer:\n"


def end_to_end_target(draft, subquestions, refine, solution):
    r"""All steps in one text, after `predict_prompt`: what one model that does everything is fine-tuned to write.

    >>> end_to_end_target("#### 4", ["How many?"], True, "#### 3")
    '#### 4\nSub-questions:\nHow many?\nRefine: Yes\nRevised answer:\n#### 3'
    """
    text = f"{draft}\nSub-questions:\n{ask_target(subquestions, refine)}"
    return f"{text}\nRevised answer:\n{solution}" if refine else text


def parse_end_to_end(text):
    r"""The answer that stands at the end of an `end_to_end_target`: the revised one, else the draft.

    >>> parse_end_to_end(end_to_end_target("#### 4", [], True, "#### 3")), parse_end_to_end("#### 4\nSub-questions:\n")
    ('#### 3', '#### 4')
    """
    draft, _, rest = text.partition("\nSub-questions:")
    return rest.partition("Revised answer:\n")[2] or draft


def trust_prompt(record, text):
    """Step 4: what the Truster scores, one text at a time."""
    return f"{question_block(record)}Answer:\n{text}"


def choice_prompt(record, first, second):
    """Step 4, decided by the LLM itself: the answer is A or B."""
    return f"{question_block(record)}Answer A:\n{first}\nAnswer B:\n{second}\nBetter answer:\n"


def plain_text(prompt, exemplars=()):
    """A prompt behind its exemplars, [(prompt, answer), ...], as a base model reads it."""
    return "".join(f"{shown}{answer}\n\n" for shown, answer in exemplars) + prompt


def chat_turns(prompt, exemplars=(), instruction=""):
    """The same as turns of a chat, [{"role", "content"}, ...]; the instruction stands in front of the first."""
    turns = [turn for shown, answer in exemplars for turn in (("user", shown.rstrip()), ("assistant", answer))]
    turns.append(("user", prompt.rstrip()))
    turns[0] = ("user", f"{instruction}\n\n{turns[0][1]}")
    return [{"role": role, "content": content} for role, content in turns]


# --- The language model: loading (4, 16 or 32 bits), batched generation, option probabilities. ---


def find_model(name):
    """A folder named relative to the working directory or to the kit, else a Hub id as it stands."""
    return next((str(path) for path in (Path(name), ROOT / name) if path.is_dir()), str(name))


def compute_dtype(bits=4):
    """fp32 on a CPU or where asked for; bf16 where the card really has it; else fp16 (a T4 emulates bf16, slowly)."""
    if bits == 32 or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextlib.contextmanager
def loading(name):
    """Turn what can go wrong while a model is fetched into one line."""
    try:
        yield
    except (GatedRepoError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the model {name!r}: {reason} (needed: a folder or an ungated Hub id with "
                        "safetensors weights; pickled ones are refused, since reading them can run any code)") from None


def model_revision(name):
    """Commit of a Hub model; for a folder a hash over its settings, its tokenizer and pieces of its weights."""
    path = Path(find_model(name))
    if not path.is_dir():
        return load_config(name)._commit_hash
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        weights = file.suffix == ".safetensors"
        if file.is_file() and (weights or file.suffix in (".json", ".jinja", ".model") or file.name == "merges.txt"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as content:
                for start in range(0, size, max(1 << 16, size // 256 if weights else 0)):  # of weights 16 MB at most
                    content.seek(start)
                    digest.update(content.read(1 << 16))
    return digest.hexdigest()[:16]


def load_config(name):
    """config.json of a model. Code of a model's own is never run, here and wherever one is loaded."""
    with loading(name):
        return transformers.AutoConfig.from_pretrained(find_model(name), trust_remote_code=False)


def load_tokenizer(name):
    """Tokenizer with a padding token; refused if it cannot give back plain text."""
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(name), trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    probe = "Ann has 12 pens.\n#### 12"
    if tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"]).strip() != probe:
        raise UserError(f"the tokenizer of {name!r} loses characters with this transformers version; use another model")
    return tokenizer


def load_base(name, bits=4, head=transformers.AutoModelForCausalLM, **settings):
    """Frozen base model in 4 bits (nf4, double quantisation), 16 or 32 bits, on the GPU if there is one.

    Source of the 4-bit settings: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
    """
    dtype = compute_dtype(bits)
    if bits == 16 and dtype == torch.float32:
        dtype = torch.bfloat16
    if bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    gc.collect()  # a Trainer that ended may still hold the last model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        settings["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    with loading(name):
        return head.from_pretrained(find_model(name), dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                    **settings).eval()


def plan_batches(lengths, budget):
    """Lists of indices, longest first, each at most `budget` tokens when padded. Follows from `lengths` alone.

    >>> plan_batches([3, 9, 4, 1], budget=10)
    [[1], [2, 0], [3]]
    """
    batches = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def require_finite(numbers, name):
    """Refuse what is no number, as fp16 may give on a card without bf16: it would pass for an answer."""
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{name!r} gives numbers that are not finite: use --bits 32, or another model")


def left_pad(rows, pad, device):
    """Token ids (rows, longest) and attention mask, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def by_halves(batch, work):
    """[(item, what work([item, ...]) makes of it), ...]; where memory runs out the batch is halved."""
    try:
        return list(zip(batch, work(batch)))
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise UserError("out of memory with one question: use a smaller model, --bits 4 or, for the LLM, "
                            "--shots 0") from None
    torch.cuda.empty_cache()
    half = len(batch) // 2
    print(f"out of memory: a batch of {len(batch)} is halved", file=sys.stderr)
    return by_halves(batch[:half], work) + by_halves(batch[half:], work)


class GrowingLayer(DynamicLayer):
    """Cache of one layer with room at its end: a step writes its own column, where DynamicLayer copies all of them."""

    buffers = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (rows, heads, n, size) keys and values; returns all of them, views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self.buffers is None or len(self.buffers[0]) != len(key_states) or self.buffers[0].shape[2] < end:
            room = [new.new_empty(*new.shape[:2], end + end // 4 + 32, new.shape[3])
                    for new in (key_states, value_states)]
            if start:
                room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
            self.buffers = room
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Only these rows, in a new buffer."""
        super().batch_select_indices(indices)
        self.buffers = None


SHARED_PREFIX = contextvars.ContextVar("cache of what all rows of a batch begin with", default=None)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, **settings):
    """Attention where all rows begin alike: keys and values of that prefix are held and read once, not once a row.

    query (rows, heads, t, size); key and value (rows, key heads, n, size) and the mask (rows, 1, t, n) without the
    prefix, which every token may see. Without a prefix it is transformers' own attention.
    """
    if SHARED_PREFIX.get() is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    rows, heads, t, size = query.shape
    held = SHARED_PREFIX.get().layers[module.layer_idx]  # (1, key heads, p, size)
    p, n = held.keys.shape[2], key.shape[2]
    if t > 1:  # the prompts: once a batch
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, t, n, dtype=torch.bool, device=query.device).tril(n - t)
        key, value = (torch.cat([shared.expand(rows, -1, -1, -1), own], 2)
                      for shared, own in ((held.keys, key), (held.values, value)))
        mask = torch.nn.functional.pad(attention_mask, (p, 0), value=True)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **settings)
    query = query.reshape(rows, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)

    def once(left, right):  # rows below each other: one product with the prefix for the whole batch
        return (left.transpose(0, 1).flatten(1, 2) @ right[0]).unflatten(1, (rows, -1)).transpose(0, 1)

    own = query @ key.mT
    if attention_mask is not None:
        own = own.masked_fill(~attention_mask, -torch.inf)
    weights = torch.cat([once(query, held.keys.mT), own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    out = once(weights[..., :p], held.values) + weights[..., p:] @ value
    return out.reshape(rows, 1, heads, size), None


transformers.AttentionInterface.register("shared_prefix", shared_prefix_attention)
transformers.AttentionMaskInterface.register("shared_prefix", sdpa_mask)


class LM:
    """A causal language model that continues prompts, with or without an adapter switched on.

    `batch_tokens` bounds rows x length of a batch; `chat`: "auto" uses the chat template where there is one.
    """

    def __init__(self, name, bits=4, batch_tokens=16384, chat="auto"):
        self.name, self.bits, self.batch_tokens = name, bits, batch_tokens
        self.tokenizer = load_tokenizer(name)
        self.model = load_base(name, bits)
        self._shares = (self.model.is_backend_compatible() and self.model.config._attn_implementation == "sdpa"
                        and not getattr(self.model.config, "sliding_window", None))
        if self._shares:
            self.model.set_attn_implementation("shared_prefix")
        self.chat = chat == "yes" or (chat == "auto" and bool(self.tokenizer.chat_template))
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self._prefix, self._cache = None, None
        # a stop can only be complete after a token with one of these characters: the others need no decoding
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self._may_stop = {i for i, piece in enumerate(pieces) if "\n" in piece or ":" in piece}

    def add_adapter(self, name, folder):
        """Load a LoRA adapter beside the weights, switched off. One copy of the weights serves with and without it."""
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        self.model.base_model.disable_adapter_layers()

    @contextlib.contextmanager
    def use(self, name):
        """`with lm.use("asker"):` the adapter is on, and prompts are plain, as it was trained; outside it is off."""
        self.model.set_adapter(name, inference_mode=True)
        self.model.base_model.enable_adapter_layers()
        self._prefix, self.chat, chat = None, False, self.chat
        try:
            yield self
        finally:
            self.model.base_model.disable_adapter_layers()
            self._prefix, self.chat = None, chat

    def render(self, prompt, exemplars=(), instruction=""):
        """Token ids of a prompt behind its exemplars, [(prompt, answer), ...]: chat turns, or text with blank lines."""
        if not self.chat:
            return self.tokenizer(plain_text(prompt, exemplars))["input_ids"]
        text = self.tokenizer.apply_chat_template(chat_turns(prompt, exemplars, instruction), tokenize=False,
                                                  add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def extend(self, prompt, text):
        """A rendered prompt and the beginning of its answer, to be continued."""
        return prompt + self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def option_ids(self, before, options):
        """The one token by which each option differs from the others behind `before`."""
        rows = [self.tokenizer(before + option, add_special_tokens=False)["input_ids"] for option in options]
        shared = len(os.path.commonprefix(rows))
        ids = [row[shared] for row in rows]
        if len(set(ids)) != len(ids):
            raise UserError(f"the tokenizer of {self.name!r} gives {options} no tokens of their own")
        return ids

    def generate(self, prompts, max_new_tokens=256, stop=None, k=1, temperature=0.0, seed=0, options=None, done=()):
        """Continue prompts; yields one batch at a time as [(index, [k generations]), ...].

        Args:
            prompts: lists of token ids (see `render`). What all share (few-shot exemplars) is computed once.
            stop: compiled pattern; a text ends behind its first match. `options`: (token ids, whether at once): read
                the log-odds of the first against the second id behind that match, or right behind the prompt.
            temperature: 0 is greedy. `k` samples share one pass over the prompt.
            done: indices that need not be made. Batches follow from `prompts` alone: a resumed run makes the same ones.

        A generation is {"text", "stopped", "tokens", "prompt_tokens", "logprob"} and, with `options`, "logit" (None
        where the stop never came). "logprob" is the natural logarithm of the whole continuation's probability.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        for ids in prompts:
            if len(ids) + max_new_tokens > limit:
                raise UserError(f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the {limit} that "
                                f"{self.name!r} reads: shorten the question, or lower --shots or --max-new-tokens")
        prefix, batches = self.plan(prompts, max_new_tokens, k)
        for number, batch in enumerate(batches):
            if not all(index in done for index in batch):
                torch.manual_seed(seed * 1_000_003 + number)
                yield by_halves(batch, lambda part: self._generate(
                    [prompts[index] for index in part], prefix, max_new_tokens, stop, k, temperature, options))

    def plan(self, prompts, max_new_tokens, k):
        """(what all prompts share, as token ids; batches of indices whose rows without it keep `batch_tokens`)."""
        prefix = os.path.commonprefix(prompts)[: min(map(len, prompts), default=1) - 1]
        if len(prefix) < 32 or len(prompts) == 1 or not self._shares:
            prefix = []
        return prefix, plan_batches([(len(ids) - len(prefix) + max_new_tokens) * k for ids in prompts],
                                    self.batch_tokens)

    def _prefix_cache(self, prefix):
        """Keys and values of the prefix, computed once for all batches."""
        if prefix != self._prefix:
            ids = torch.tensor([prefix], device=self.model.device)
            self._cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self._prefix = prefix
        return self._cache

    @torch.inference_mode()
    def _generate(self, prompts, prefix, max_new_tokens, stop, k, temperature, options):
        shared = SHARED_PREFIX.set(self._prefix_cache(prefix) if prefix else None)
        try:
            return self._continue([row[len(prefix):] for row in prompts], len(prefix), max_new_tokens, stop, k,
                                  temperature, options)
        finally:
            SHARED_PREFIX.reset(shared)

    def _continue(self, prompts, shared, max_new_tokens, stop, k, temperature, options):
        device, count = self.model.device, len(prompts) * k
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id, device)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + shared
        cache = transformers.Cache(layer_class_to_replicate=GrowingLayer)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1).logits[:, -1].float().repeat_interleave(k, 0)
        if k > 1:
            cache.batch_repeat_interleave(k)
        mask, positions = mask.repeat_interleave(k, 0), positions[:, -1:].repeat_interleave(k, 0)
        made = [{"text": "", "stopped": False, "tokens": 0, "prompt_tokens": shared + len(prompt), "logprob": 0.0,
                 **({"logit": None} if options else {})} for prompt in prompts for _ in range(k)]
        written = [[] for _ in range(count)]
        alive = list(range(count))  # which generation each row of the batch is
        deciding = [options is not None and options[1]] * count  # rows whose next token is the decision
        ended = [False] * count
        for step in range(max_new_tokens + 1):
            whole = logits.logsumexp(-1)
            require_finite(whole.tolist(), self.name)
            tokens = (logits.argmax(-1) if temperature == 0 else
                      torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0])
            chosen = (logits.gather(1, tokens[:, None])[:, 0] - whole).tolist()
            stay = []
            for row, (index, token) in enumerate(zip(alive, tokens.tolist())):
                if deciding[index] and not ended[index]:
                    made[index]["logit"] = (logits[row, options[0][0]] - logits[row, options[0][1]]).item()
                if ended[index] or deciding[index] or step == max_new_tokens:  # or cut off
                    ended[index] = True
                    continue
                made[index]["logprob"] += chosen[row]
                made[index]["tokens"] += 1
                if token in self.ends:
                    made[index]["stopped"] = ended[index] = True
                    continue
                written[index].append(token)
                if stop is not None and token in self._may_stop:
                    text = self.tokenizer.decode(written[index], skip_special_tokens=True)
                    if match := stop.search(text):
                        made[index]["stopped"] = True
                        written[index] = text[: match.end()]
                        ended[index], deciding[index] = options is None, options is not None
                        if ended[index]:
                            continue
                stay.append(row)
            if not stay:
                break
            if len(stay) <= 0.75 * len(alive):  # ended rows leave, several at once since that copies the cache
                keep = torch.tensor(stay, device=device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                alive = [alive[row] for row in stay]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            positions = positions + 1
            logits = self.model(input_ids=tokens[:, None], attention_mask=mask, position_ids=positions,
                                past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        for index, text in enumerate(written):
            text = text if isinstance(text, str) else self.tokenizer.decode(text, skip_special_tokens=True)
            made[index]["text"] = text.strip()
        return [made[i : i + k] for i in range(0, count, k)]


class Endpoint:
    """A language model behind an OpenAI-compatible server, with what the four steps use of `LM`.

    Plain prompts go to /completions, chat turns to /chat/completions; `chat` "auto" means chat, since a server does
    not say what its model is. The key comes from OPENAI_API_KEY and goes nowhere but to the server.
    """

    retries = 5  # by the client, on 429, 5xx and lost connections; after 0.5, 1, 2, 4, 8 s or as the server says
    next_exemplar = "\nQuestion:"  # here a base model has ended its answer and goes on to a question of its own

    def __init__(self, url, name, chat="auto", concurrency=8):
        try:
            import openai
        except ImportError:
            raise UserError("--base-url needs the official client: pip install openai") from None
        if not re.match("https?://[^/?#]", url):
            raise UserError("--base-url is an address such as http://localhost:8000/v1")
        if concurrency < 1:
            raise UserError("--concurrency is 1 or more")
        self.name, self.chat, self.concurrency, self.openai = name, chat != "no", concurrency, openai
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"  # one's own server needs none
        if not self.key.isascii():
            raise UserError("OPENAI_API_KEY has characters that are in no key: set it again")
        self.shown = re.sub("//[^/]*@", "//", url).partition("?")[0]  # the address without what may be secret in it
        self.logprobs, self.answered = True, False  # until the server refuses to give them; until it has answered once
        self.client = openai.OpenAI(base_url=url, api_key=self.key, max_retries=self.retries,
                                    timeout=openai.Timeout(300, connect=10))

    def render(self, prompt, exemplars=(), instruction=""):
        """As `LM.render`, but turns or text instead of token ids."""
        return chat_turns(prompt, exemplars, instruction) if self.chat else plain_text(prompt, exemplars)

    def extend(self, prompt, text):
        """As `LM.extend`; servers do not continue a turn of a chat, so the decision is asked for in another."""
        if not self.chat:
            return prompt + text
        return [*prompt, {"role": "assistant", "content": text}, {"role": "user", "content": f"{DECISION} Yes or No?"}]

    def option_ids(self, before, options):
        """The words that `generate` looks for: a server gives its tokens as text."""
        return [option.strip() for option in options]

    def generate(self, prompts, max_new_tokens=256, stop=None, k=1, temperature=0.0, seed=0, options=None, done=()):
        """As `LM.generate`; a batch is one question, and they come in the order in which they are finished.

        Each of the k samples is a request of its own, since not every server knows `n`. Tokens are as the server counts
        them. Where it gives no log-probabilities, "logprob" is None and "logit" plus or minus infinity, by the word.
        """
        todo = [index for index in range(len(prompts)) if index not in done]
        rest, made, over = iter(todo), queue.SimpleQueue(), threading.Event()

        def work():
            for index in rest:  # one iterator for all threads
                try:
                    made.put((index, [self._generate(prompts[index], max_new_tokens, stop, temperature,
                                                     seed * 1_000_003 + index * k + number, options)
                                      for number in range(k) if not over.is_set()]))
                except Exception as error:  # told by the one who waits
                    made.put((index, error))

        for _ in range(min(self.concurrency, len(todo))):
            threading.Thread(target=work, daemon=True).start()  # an error ends the process at once, requests or not
        self.answered |= len(todo) < len(prompts)
        failed = {"text": "", "stopped": False, "failed": True, "tokens": 0, "prompt_tokens": 0, "logprob": None,
                  **({"logit": -math.inf} if options else {})}
        held, in_a_row = [], 0  # refused questions: they have failed if others are answered
        try:
            for _ in todo:
                index, several = made.get()
                if not isinstance(several, Exception):
                    self.answered, in_a_row = True, 0
                    yield [(index, several)]
                elif isinstance(several, Refused) and in_a_row < 10:
                    held, in_a_row, refusal = [*held, index], in_a_row + 1, several
                else:
                    raise several
                if held and self.answered:
                    print(f"{refusal} An answer counts as failed.", file=sys.stderr)
                    yield [(index, [dict(failed) for _ in range(k)]) for index in held]
                    held = []
            if held:
                raise refusal
        finally:  # what has not begun is not asked any more
            over.set()

    def _generate(self, prompt, max_new_tokens, stop, temperature, seed, options):
        settings = {"model": self.name, "temperature": temperature, "seed": seed}
        if options and options[1]:  # what LM reads without writing it has to be written
            max_new_tokens += 7
        if self.chat:
            settings |= {"messages": prompt, "max_completion_tokens": max_new_tokens}
        else:
            settings |= {"prompt": prompt, "max_tokens": max_new_tokens, "stop": [self.next_exemplar]}
        if self.logprobs:  # of the tokens, and where a decision is read of the others: as many as all servers give
            settings |= ({"logprobs": True, "top_logprobs": 5 if options else 0} if self.chat else
                         {"logprobs": 5 if options else 1})
        choice, usage = self._request(settings)
        if usage.completion_tokens > max_new_tokens + 1:  # max_completion_tokens is not known everywhere
            raise UserError(f"{self.shown} wrote {usage.completion_tokens} tokens where {max_new_tokens} were allowed: "
                            "use another server" + ", or --chat no" * self.chat)
        text = ((choice.message.content or "") if self.chat else choice.text).encode("utf-8", "replace").decode()
        # /completions: some servers give the stop string back, some do not
        text, ended, _ = (text, "", "") if self.chat else text.partition(self.next_exemplar)
        match = stop and stop.search(text)
        end, tokens = match.end() if match else len(text), self._tokens(choice)
        whole = choice.finish_reason not in ("length", "content_filter")  # servers have many words for its end
        made = {"text": text[:end].strip(), "stopped": bool(match or ended or whole),
                "tokens": usage.completion_tokens, "prompt_tokens": usage.prompt_tokens,
                "logprob": sum(logprob for start, _, logprob, _ in tokens if start < end)
                if tokens or choice.logprobs and not text else None}
        if options:
            words, at_once = options
            made["logit"] = self._log_odds(words, text, 0 if at_once else end, tokens)
            if at_once and made["logit"] is None:
                made["logit"] = -math.inf  # asked outright it said neither: taken as the second
        return made

    def _request(self, settings):
        """(choice, usage) of one request; what can go wrong becomes one line."""
        try:
            reply = (self.client.chat if self.chat else self.client).completions.create(**settings)
        except self.openai.OpenAIError as error:
            if "logprobs" in settings and "logprobs" in str(error):
                if self.logprobs:
                    print(f"{self.shown} gives no log-probabilities: decisions are read from words", file=sys.stderr)
                self.logprobs = False
                return self._request({key: value for key, value in settings.items() if "logprobs" not in key})
            refused = isinstance(error, self.openai.BadRequestError)  # one alone may be too long, or its content
            raise (Refused if refused else UserError)(self._explain(error)) from None
        except ValueError:  # no JSON
            reply = None
        if not getattr(reply, "choices", None) or not reply.usage:
            raise UserError(f"{self.shown} answers, but not as an OpenAI-compatible server (most end in /v1)")
        return reply.choices[0], reply.usage

    def _explain(self, error):
        """One line about an error of the client, without the key."""
        status = getattr(error, "status_code", None)
        if status == 401:  # what the server says here may hold a part of the key
            return f"{self.shown} refuses the key (401): set the environment variable OPENAI_API_KEY"
        said = f"{self.shown}: " + visible(" ".join(str(error).split()).replace(self.key, "..."))[:300]
        if status == 404:
            return said + " Check --model, --base-url (most end in /v1) and --chat (no: /completions)"
        if status is None or status == 429 or status >= 500:
            said += f" ({self.retries + 1} tries; what is finished is kept, the same command goes on from there)"
        return said

    def _tokens(self, choice):
        """[(where it starts, token, log-probability, {token: log-probability} there), ...], [] if not given."""
        given = choice.logprobs
        if given is None:
            return []
        if self.chat:
            rows = [(token.token, token.logprob, {other.token: other.logprob for other in token.top_logprobs or ()})
                    for token in given.content or ()]
        else:
            rows = [(token, logprob, others or {}) for token, logprob, others in
                    zip(given.tokens or (), given.token_logprobs or (), given.top_logprobs or ())]
        starts = itertools.accumulate((len(token) for token, _, _ in rows), initial=0)
        return [(start, *row) for start, row in zip(starts, rows)]

    def _log_odds(self, words, text, start, tokens):
        """Log-odds of the first word against the second where one stands in `text` at `start`, else None."""
        word = re.compile(rf"\W*(?:answer )?({'|'.join(words)})\b", re.IGNORECASE).match(text, start)
        if word is None:
            return None
        there = [others for begin, token, _, others in tokens if begin <= word.start(1) < begin + len(token)]
        listed = [[logprob for others in there for token, logprob in others.items() if token.strip() == name]
                  for name in words]
        if any(listed):  # one that is not listed is at most as likely as the least of those that are
            first, second = (max(found, default=min(there[0].values())) for found in listed)
            return first - second
        return math.inf if word[1].lower() == words[0].lower() else -math.inf


def load_llm(args):
    """The LLM: on this machine, or with --base-url behind a server."""
    if args.base_url:
        return Endpoint(args.base_url, args.model, args.chat, args.concurrency)
    return LM(args.model, args.bits, args.batch_tokens, args.chat)


# --- The four steps. Each yields batches [(index of the record, row), ...]; `stage` keeps them on disk. ---

INSTRUCTIONS = {  # for chat models, in front of the first turn
    "cot": "Answer the question. Reason step by step, one step a line. The last line is #### and the answer.",
    "decomp": "Answer the question. On each line ask one sub-question and answer it. "
              "The last line is #### and the answer.",
    "ask": "Write the sub-questions that an answer to the question has to settle, one a line. Then decide whether the "
           "given answer has to be refined: the last line is 'Refine: Yes' or 'Refine: No'.",
    "choose": "Which answer to the question is better? Write one letter, A or B.",
    "refine": "Check the given answer and write a revised answer. Reason step by step, one step a line. "
              "The last line is #### and the answer.",
}


def answer_stop(task, chat):
    """Where a solution ends: behind its answer line; for a plain prompt also where the next exemplar would begin."""
    line = ANSWER_LINE[TASKS[task]["answer"]] + r"[^\n]*\n"
    return re.compile(line if chat else line + r"|\n\n|\n(?=Question:)")


def solutions(lm, task, step, prompts, exemplars, **how):
    """Continue prompts to solutions; yields batches of (index, [candidate, ...]). `how` goes to `LM.generate`."""
    prompts = [lm.render(prompt, exemplars, INSTRUCTIONS[step]) for prompt in prompts]
    for batch in lm.generate(prompts, stop=answer_stop(task, lm.chat), **how):
        yield [(index, [{**made, "answer": extract_answer(task, made["text"])} for made in several])
               for index, several in batch]


def predict(lm, task, records, exemplars=(), strategy="cot", facts=False, **how):
    """Step 1: an answer to each question, or k of them (paper, section 3.1)."""
    shown = [(predict_prompt(e, strategy, facts), solution_text(e["solution"], e["answer"], strategy))
             for e in exemplars]
    prompts = [predict_prompt(record, strategy, facts) for record in records]
    yield from solutions(lm, task, strategy, prompts, shown, **how)


def draw(lm, args, records, k, temperature, seed, first=0, **how):
    """Samples first, first + 1, ... of each record as rows of samples.jsonl: a prediction, its number, its verdict."""
    exemplars = load_exemplars(args.task, args.shots, args.data)
    for batch in predict(lm, args.task, records, exemplars, args.strategy, args.facts == "both", k=k,
                         temperature=temperature, seed=seed, max_new_tokens=args.max_new_tokens, **how):
        yield [(i, [{"sample": first + j, "correct": verdict(args.task, made, records[i]["answer"]), **made}
                    for j, made in enumerate(several)]) for i, several in batch]


def probability(log_odds):
    """Of the first of two options, from the log-odds of it against the second; also for plus and minus infinity.

    >>> probability(0.0), probability(float("inf"))
    (0.5, 1.0)
    """
    return (1 + math.tanh(log_odds / 2)) / 2


def subquestions_of(record):
    """The gold sub-questions of a record or exemplar."""
    return [subquestion for subquestion, _ in record.get("solution", ()) if subquestion]


def parse_subquestions(text):
    r"""The sub-questions in an Asker's text: the lines before the decision, without bullets, twelve at most.

    An LLM that asks itself may revise the answer at once, without a decision; that is no sub-question.

    >>> parse_subquestions("1. How many are left?\n- Who has them?\nRefine:")
    ['How many are left?', 'Who has them?']
    """
    asked = re.split(f"{DECISION}|Revised answer:", text)[0]
    lines = [re.sub(r"^\s*(?:[-*]|\d{1,3}[.)])?\s*", "", line).strip() for line in asked.splitlines()]
    return [line for line in lines if line][:12]


def ask(lm, task, records, drafts, exemplars=(), shift=0.0, **how):
    """Step 2: sub-questions and the probability that the draft has to be refined, in one pass (paper, section 3.2).

    The probability is read from the logits of Yes against No behind "Refine:"; `shift` puts the prior back that
    balanced training took out. The trained Asker (`with lm.use("asker")`) and the LLM asking itself both come here.
    """
    shown = [(ask_prompt(e, e["draft"]),
              ask_target(subquestions_of(e), not is_correct(task, e["draft"], e["answer"]))) for e in exemplars]
    prompts = [lm.render(ask_prompt(record, draft), shown, INSTRUCTIONS["ask"])
               for record, draft in zip(records, drafts)]
    options = lm.option_ids(DECISION, [" Yes", " No"])
    for batch in lm.generate(prompts, stop=re.compile(DECISION), options=(options, False), **how):
        rows = {index: {**made, "subquestions": parse_subquestions(made["text"])} for index, (made,) in batch}
        undecided = [index for index, row in rows.items() if row["logit"] is None]  # the model is asked outright
        ends = ["\n".join([*rows[index]["subquestions"], DECISION]) for index in undecided]
        ends = [lm.extend(prompts[index], end) for index, end in zip(undecided, ends)]
        for again in lm.generate(ends, max_new_tokens=1, options=(options, True)):
            for position, (made,) in again:
                row = rows[undecided[position]]
                row |= {"logit": made["logit"], **{key: row[key] + made[key] for key in ("tokens", "prompt_tokens")}}
        yield [(i, [{"subquestions": row["subquestions"], "p_refine": probability(row["logit"] + shift),
                     **{key: row[key] for key in ("stopped", "tokens", "prompt_tokens")}}]) for i, row in rows.items()]


def refine(lm, task, records, drafts, subquestions=None, exemplars=(), facts=False, **how):
    """Step 3: a revised answer from question, draft and sub-questions (None: without; paper, section 3.3)."""
    with_questions = any(subquestions or ())
    shown = [(refine_prompt(e, e["draft"], subquestions_of(e) if with_questions else None, facts),
              solution_text(e["solution"], e["answer"])) for e in exemplars]
    prompts = [refine_prompt(record, draft, asked, facts)
               for record, draft, asked in zip(records, drafts, subquestions or [None] * len(records))]
    yield from solutions(lm, task, "refine", prompts, shown, **how)


def choose(lm, records, texts, done=()):
    """Step 4 by the LLM itself: it sees both texts as A and B, in both orders, and names the better (row asker_self).

    `texts[i]` is {name: text} of two; yields batches of (i, [{name: probability, ..., "tokens", "prompt_tokens"}]),
    the mean over both orders, since a model may prefer a place.
    """
    pairs = [list(pair.values())[::order] for pair in texts for order in (1, -1)]
    prompts = [lm.render(choice_prompt(records[place // 2], *pair), instruction=INSTRUCTIONS["choose"])
               for place, pair in enumerate(pairs)]
    options, seen = lm.option_ids("Better answer:\n", ["A", "B"]), {}
    done = {place for index in done for place in (2 * index, 2 * index + 1)}
    for batch in lm.generate(prompts, max_new_tokens=1, options=(options, True), done=done):
        seen |= {place: made for place, (made,) in batch}
        rows = []
        for index in {place // 2 for place, _ in batch}:
            if {2 * index, 2 * index + 1} <= seen.keys():
                (first, second), read = texts[index], (seen[2 * index], seen[2 * index + 1])
                p = (probability(read[0]["logit"]) + 1 - probability(read[1]["logit"])) / 2
                rows.append((index, [{first: p, second: 1 - p, **{
                    key: sum(made[key] for made in read) for key in ("tokens", "prompt_tokens")}}]))
        yield rows


def end_to_end(lm, task, records, **how):
    """All four steps by one fine-tuned model in one go: draft, sub-questions, decision and, if so, the refinement."""
    prompts = [lm.render(predict_prompt(record)) for record in records]
    for batch in lm.generate(prompts, **how):
        yield [(i, [{**made, "answer": extract_answer(task, text), "text": text, "written": made["text"]}])
               for i, (made,) in batch for text in [parse_end_to_end(made["text"])]]


class Truster:
    """Scores answers: one scalar for a question and a text, the higher the better (paper, section 3.4)."""

    def __init__(self, folder, batch_tokens=16384, about=None):
        self.about = about or read_about(folder, "train_truster.py")
        base = load_scorer(self.about["model"], self.about["bits"], self.about["seed"])
        with loading(folder):
            self.model = PeftModel.from_pretrained(base, folder).eval()
        self.tokenizer, self.batch_tokens = load_tokenizer(self.about["model"]), batch_tokens
        check_scorer(self.model)

    @torch.inference_mode()
    def score(self, records, texts, done=()):
        """`texts[i]` is {name: text} for record i; yields batches of (i, [{name: score, ..., "prompt_tokens": n}]).

        Equal texts are scored once; their tokens are counted for each.
        """
        different = [list(dict.fromkeys(several.values())) for several in texts]
        rows = [self.tokenizer([trust_prompt(record, text) for text in several])["input_ids"]
                for record, several in zip(records, different)]
        most = max(map(len, rows), default=0)

        def work(batch):
            ids, mask = left_pad([row for i in batch for row in rows[i]], self.tokenizer.pad_token_id,
                                 self.model.device)
            scores, made = score_batch(self.model, ids, mask).tolist(), []
            require_finite(scores, self.about["model"])
            scores = iter(scores)
            for i in batch:
                score, length = dict(zip(different[i], scores)), dict(zip(different[i], map(len, rows[i])))
                made.append([{**{name: score[text] for name, text in texts[i].items()},
                              "prompt_tokens": sum(length[text] for text in texts[i].values())}])
            return made

        for batch in plan_batches([most * max(map(len, several)) for several in rows], self.batch_tokens):
            if not all(index in done for index in batch):
                yield by_halves(batch, work)


def score_batch(model, ids, mask):
    """Scores (rows,) of token ids (rows, length) padded on the left; the last token carries the score."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    dtype = getattr(model, "module", model).get_input_embeddings().weight.dtype
    # the head is in fp32, what it reads may not be
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 0].float()


class Shelf:
    """The models of a run, one in memory at a time; the LLM and what is fine-tuned from the same base are one model."""

    def __init__(self, args):
        self.args, self._model, self._key, self._endpoint = args, None, None, None
        self.folder = getattr(args, "adapters", None) or args.runs / args.task / args.run

    def about(self, name):
        """args.json of the adapter "asker", "finetuned", "end_to_end" or "truster"."""
        return read_about(self.folder / name, "train_truster.py" if name == "truster" else "train_asker.py")

    def get(self, name):
        """The LLM ("llm"), the Truster, or the model that carries an adapter, for `with shelf.get(name).use(name):`."""
        if name == "llm" and self.args.base_url:
            self._endpoint = self._endpoint or load_llm(self.args)  # takes no memory here
            return self._endpoint
        args = self.args
        about = {"model": args.model, "bits": args.bits} if name == "llm" else self.about(name)
        key = name == "truster", find_model(about["model"]), about["bits"]
        if key != self._key:
            self._model = self._key = None
            if name == "truster":
                self._model = Truster(self.folder / name, args.batch_tokens)
            else:
                self._model = LM(about["model"], about["bits"], args.batch_tokens, args.chat)
                self._add_adapters(key)
            self._key = key
        return self._model

    def _add_adapters(self, key):
        """What there is for this base. All at once and before its first pass: bitsandbytes packs the 4-bit weights anew
        then on some CPUs, and loading an adapter after that would round them once more."""
        for name in ("asker", "finetuned", "end_to_end"):
            if (self.folder / name / "args.json").is_file():
                about = self.about(name)
                if (False, find_model(about["model"]), about["bits"]) == key:
                    self._model.add_adapter(name, self.folder / name)


# --- The run folder: what was made stays made. ---


@contextlib.contextmanager
def lock(folder):
    """One process at a time writes in a folder; the lock goes with the process, however it ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.nullcontext() if RANK else filelock.FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another process is at work in {folder}: wait for it, or give another --run or "
                        "--runs") from None


@functools.cache
def parameters(name):
    """Number of parameters of a model, counted on its architecture alone."""
    with torch.device("meta"):
        config = load_config(name)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()


def data_hash(task, splits=("train", "dev"), data=ROOT / "data"):
    """A hash over the records of splits of a task."""
    return short_hash([load_task(task, split, data=data) for split in splits])


def provenance():
    """Versions of the packages and the commit of the kit (with "-dirty" where it was changed since)."""
    commit = None
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "bitsandbytes", "peft", "numpy")
    return {"commit": commit, "versions": {name: version(name) for name in packages}}


def short_hash(value):
    """A hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def require_same(before, now, what, mend):
    """Refuse, naming the first difference, unless `before` holds all that `now` does."""
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(f"{what} was made with {key} = {before.get(key)}, now it is {value}: {mend}")


LLM_KEYS = ["bits", "strategy", "facts", "shots", "chat", "max_new_tokens"]  # what an LLM's answers depend on


def write_about(path, about):
    """What made an output, beside it. An adapter's args.json is written last: a folder with it is complete."""
    write_json(path, {**about, "provenance": provenance()})


def maker(path):
    """The file in which `claim` writes what makes the output at `path`."""
    return Path(path).with_suffix(".args.json")


def claim(path, made_by):
    """Write beside `path` what makes it; refuse, naming the difference, if something else already did.

    Other package versions or another commit only warn and are added to the record: to refuse them would throw away
    hours of work after a `git pull` or at Colab's next update.
    """
    about = maker(path)
    mend = f"delete it (and {about.name}) or give another --run or --runs"
    if not about.exists():
        if Path(path).exists() and not RANK:
            raise UserError(f"{path} is there, but not {about.name}, which says what made it: bring that back, or "
                            + mend)
        write_about(about, made_by)
        return
    before, now = json.loads(about.read_text()), provenance()
    require_same(before, made_by, path, mend)
    makers = [before["provenance"], *before.get("continued_by", [])]
    if now not in makers:
        old, new = ({"commit": made["commit"], **made["versions"]} for made in (makers[-1], now))
        others = "; ".join(f"{key} = {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key])
        print(f"warning: {path} was made with {others}: what is lacking is made with these", file=sys.stderr)
        write_json(about, {**before, "continued_by": [*makers[1:], now]})


def require_distinct(ids):
    """Refuse an id that stands for two questions: one would be given the other's answers."""
    if doubled := [name for name, count in collections.Counter(ids).items() if count > 1]:
        raise UserError(f"the id {doubled[0]!r} stands for two questions: ids must differ within and between splits")


def stage(path, label, ids, batches, per_id=1):
    """Rows of a step by id, {id: [row, ...]}; what `path` holds is not made again, the rest is appended by batches.

    Args:
        batches: function of `done`, the set of indices into `ids` that are complete; yields [(index, [row, ...]), ...].
        per_id: rows that make an id complete; they are told apart by their key "sample".
    """
    require_distinct(ids)
    rows = {}
    if Path(path).exists():
        for row in read_jsonl(path, journal=True):
            rows.setdefault(row["id"], {})[row.get("sample", 0)] = row
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    done = {index for index, name in enumerate(ids) if len(rows.get(name, ())) >= per_id}
    if len(done) < len(ids):
        with tqdm(total=len(ids), initial=len(done), desc=label, unit="q", dynamic_ncols=True) as bar, \
                open(path, "a", encoding="utf-8") as file:
            for batch in batches(done):
                new = [{"id": ids[index], **row} for index, several in batch for row in several
                       if row.get("sample", 0) not in rows.get(ids[index], ())]
                file.write(to_lines(new))
                file.flush()
                wrote()
                for row in new:
                    rows.setdefault(row["id"], {})[row.get("sample", 0)] = row
                bar.update(len({row["id"] for row in new}))
    return {name: [row for _, row in sorted(rows[name].items())] for name in ids}


# --- QLoRA: what both trainings share. The loop itself is transformers.Trainer. ---


def add_lora(model, task_type, rank, start=None):
    """LoRA on all linear layers of a frozen base (QLoRA, arXiv 2305.14314); adapters and head stay in fp32.

    `start` is the folder of an adapter to go on from.
    """
    if torch.cuda.is_available() and getattr(model, "is_loaded_in_4bit", False):
        dtype = model.get_input_embeddings().weight.dtype  # norms in fp32, gradient checkpointing on
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        for embedding in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            embedding.to(dtype)  # frozen, and gigabytes in fp32 where the vocabulary is large
    elif torch.cuda.is_available():
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if start:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
    else:
        model = get_peft_model(model, LoraConfig(
            task_type=task_type, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
            modules_to_save=["score"] if task_type == TaskType.SEQ_CLS else None))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
            assert "lora_" in name or ".score." in name, name
    return model


def load_scorer(name, bits, seed):
    """A base with a fresh scalar head for the Truster, the head in fp32 and never quantised."""
    transformers.set_seed(seed)
    model = load_base(name, bits, transformers.AutoModelForSequenceClassification, num_labels=1,
                      pad_token_id=load_tokenizer(name).pad_token_id)
    model.score.float()
    return model


def check_scorer(model):
    """The Truster's head must be a plain fp32 layer: 4-bit loading and adapters have lost or quantised it elsewhere."""
    heads = [module for name, module in model.named_modules() if name.endswith("score.modules_to_save.default")]
    assert len(heads) == 1 and type(heads[0]) is torch.nn.Linear and heads[0].weight.dtype == torch.float32, heads


class StopOnNonFinite(transformers.TrainerCallback):
    """End training at the first loss or gradient that is not finite, instead of averaging it away.

    In fp16 a gradient may overflow: the step is left out and the loss scaled down, 16 times in a row at most.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = state.global_step  # whose gradient was finite

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save  # what is kept was looked at

    def on_log(self, args, state, control, logs=None, **kwargs):
        if math.isfinite(logs.get("grad_norm", math.nan)):
            self.last = state.global_step
        overflow = args.fp16 and state.global_step - self.last <= 20
        for name in ("loss",) if overflow else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise UserError(f"{name} is {logs[name]} at step {state.global_step}: lower --lr, or on a card without "
                                "bf16 use --bits 32; the last checkpoint is kept")

    def on_save(self, *args, **kwargs):
        wrote()  # a checkpoint is a write like any other


class SortedSteps(torch.utils.data.Sampler):
    """Examples in random order, those of one optimiser step sorted by length: its batches then need little padding.

    Which examples meet in a step stays random, so the loss does not go up and down with the length. `epoch` is a
    function: under torchrun the Trainer's `set_epoch` does not get through to a sampler.
    """

    def __init__(self, lengths, step, seed, epoch):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = list(range(len(self)))
        random.Random(f"{self.seed} {self.epoch()}").shuffle(order)
        for start in range(0, len(order), self.step):
            yield from sorted(order[start : start + self.step], key=lambda index: -self.lengths[index])


class LossTrainer(transformers.Trainer):
    """The Trainer with a loss function of (model, inputs) that returns a mean over the batch, and `SortedSteps`."""

    def __init__(self, *args, loss, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.loss_is_scaled_for_ga = loss, False
        self.model_accepts_loss_kwargs = False  # says the same to transformers before 5.19

    def _get_train_sampler(self, train_dataset=None):
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SortedSteps(list(map(tokens_of, self.train_dataset)), step, self.args.seed,
                           epoch=lambda: int(self.state.epoch or 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model, inputs)


def peak_memory():
    """Bytes that tensors took at most on the GPU, else that this process took; None where neither is known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_checkpoint(folder):
    """The last whole checkpoint in `folder`, or None: its trainer_state.json is written last, so it can be read."""
    whole = []
    for path in Path(folder).glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # of a killed run, or a full disk
            whole.append((json.loads(path.read_text())["global_step"], str(path.parent)))
    return max(whole, default=(0, None))[1]


def fine_tune(model, examples, collate, loss, args, folder, epochs, size=None):
    """Train the adapter of `model` on `examples`, going on from its last checkpoint; returns figures of it.

    What is in `folder` when this returns is the trained adapter; `model` is not, where an earlier start had ended.
    `size` is --batch-size, smaller where memory ran out: as many more batches are added up, so that a step remains the
    same.
    """
    finished = Path(folder) / "checkpoints/trained.json"
    if finished.is_file():  # the Trainer would take another step after the last of a broken epoch
        print(f"going on from {finished}")
        return json.loads(finished.read_text())
    dtype, cuda, size = compute_dtype(args.bits), torch.cuda.is_available(), size or args.batch_size
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    fresh = [weight.detach().cpu().clone() for weight in trainable]
    settings = transformers.TrainingArguments(
        output_dir=str(Path(folder) / "checkpoints"), num_train_epochs=epochs, learning_rate=args.lr,
        lr_scheduler_type="cosine", warmup_steps=0.05, max_grad_norm=1.0, per_device_train_batch_size=size,
        gradient_accumulation_steps=args.accumulate * args.batch_size // size,
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        seed=args.seed, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not cuda,
        logging_steps=10, logging_nan_inf_filter=False, save_steps=args.save_steps,
        save_total_limit=1, report_to=args.report_to, remove_unused_columns=False, dataloader_pin_memory=cuda,
        include_num_input_tokens_seen="non_padding", disable_tqdm=False, ddp_find_unused_parameters=False)
    settings._n_gpu = min(settings.n_gpu, 1)  # more cards through torchrun alone: DataParallel knows no 4-bit weights
    trainer = LossTrainer(model, settings, collate, examples, loss=loss, callbacks=[StopOnNonFinite()])
    last, full = last_checkpoint(settings.output_dir), False
    if last:
        print(f"going on from {last}")
    try:
        trainer.train(resume_from_checkpoint=last)
    except torch.OutOfMemoryError:
        full = True  # dealt with below, since an exception holds on to what filled the memory
    if full and (size == 1 or settings.world_size > 1):  # several processes cannot agree on smaller batches now
        raise UserError(f"out of memory with a batch of {size}: lower --batch-size and raise --accumulate, lower "
                        "--max-length, or use a smaller model or --bits 4; the last checkpoint is kept")
    if full:
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        for weight, old in zip(trainable, fresh):  # there may be no checkpoint yet
            weight.data.copy_(old)
        half = size // 2 if size % 2 == 0 else 1
        print(f"out of memory: a batch of {size} becomes {size // half} batches of {half}", file=sys.stderr)
        return fine_tune(model, examples, collate, loss, args, folder, epochs, half)
    if RANK == 0:
        model.save_pretrained(folder)
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    before = int(last.rpartition("-")[2]) if last else 0  # steps of an earlier start, which took as long each
    seconds = state.log_history[-1]["train_runtime"] * state.global_step / max(1, state.global_step - before)
    figures = {"steps": state.global_step, "examples": len(examples), "loss": losses[-1] if losses else None,
               "trainable_parameters": sum(weight.numel() for weight in trainable),
               "tokens": state.num_input_tokens_seen, "seconds": round(seconds, 1), "peak_memory": peak_memory()}
    write_json(finished, figures)
    trainer.accelerator.wait_for_everyone()
    return figures


def load_samples(args, records):
    """({id: rows in order of "sample"}, hash of that) from `python art.py sample`, for all of `records`."""
    path, mend = args.runs / args.task / "samples.jsonl", f"make it with: python art.py sample --task {args.task}"
    samples = {}
    for row in read_jsonl(path, mend):
        samples.setdefault(row["id"], []).append(row)
    if not maker(path).is_file():
        raise UserError(f"{maker(path)}, which says what made the samples, is missing; {mend}")
    k = json.loads(maker(path).read_text()).get("k")
    if not k:
        raise UserError(f"{path} is not finished: python art.py sample with the same flags goes on with it")
    if lacking := sum(len(samples.get(record["id"], ())) < k for record in records):
        raise UserError(f"{path} lacks samples of {lacking} of {len(records)} questions: {mend} and the same --limit")
    samples = {record["id"]: sorted(samples[record["id"]], key=lambda row: row["sample"]) for record in records}
    return samples, short_hash(samples)


def labels_of(rows):
    """{text: correct} of the different samples of a question; one that a server refused teaches nothing.

    >>> labels_of([{"text": "#### 4", "correct": True}, {"text": "", "correct": False, "failed": True}])
    {'#### 4': True}
    """
    return {row["text"]: row["correct"] for row in rows if not row.get("failed")}


def tokens_of(example):
    """Length in tokens of an Asker's example, or of the longest answer in a Truster's."""
    return max(map(len, example["rows"])) if "rows" in example else len(example["prompt"]) + len(example["target"])


def drop_long(examples, max_length):
    """Examples of at most `max_length` tokens; longer ones are left out and counted: cutting would cut the answer."""
    kept = [example for example in examples if tokens_of(example) <= max_length]
    if not kept:
        raise UserError(f"all {len(examples)} training examples exceed --max-length {max_length} tokens: raise it")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} examples left out: over --max-length {max_length}")
    return kept


ADAPTER = "adapter_model.safetensors"


def adapter_hash(folder):
    """A hash of the weights of an adapter."""
    return hashlib.sha256((Path(folder) / ADAPTER).read_bytes()).hexdigest()[:16]


def read_about(folder, script):
    """args.json of an adapter; refused where base model or prompts are no longer those it was trained with."""
    path = Path(folder) / "args.json"
    if not (path.is_file() and path.with_name(ADAPTER).is_file()):  # peft would take a pickled one instead
        raise UserError(f"no trained adapter ({ADAPTER} and args.json) in {folder}: make it with: python {script} "
                        "(same --task, --run, --preset)")
    about = json.loads(path.read_text())
    now = {"prompt_version": PROMPT_VERSION, "revision": model_revision(about["model"])}
    require_same(about, now, f"the adapter in {folder}", f"train it again with: python {script} --run ANOTHER")
    return about


def already_trained(folder, about):
    """The finished args.json of `folder` if made by `about`; None if nothing is there; refused if made otherwise."""
    path = Path(folder) / "args.json"
    if not path.is_file():
        claim(Path(folder) / "checkpoints", about)
        return None
    before = json.loads(path.read_text())
    require_same(before, about, folder, "delete that folder or give another --run")
    print(f"{folder} is trained already with these arguments: nothing to do")
    return before


def auc(scores, labels):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half. None without both kinds.

    >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return None
    positive, negative = scores[labels][:, None], scores[~labels][None, :]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def best_threshold(p, gain):
    """The threshold on `p` (refine at or above it) with the largest sum of `gain` (n,), the middle one among equals.

    >>> best_threshold([0.1, 0.6, 0.9], [-1, 1, 1])
    0.35
    """
    p, gain = np.asarray(p), np.asarray(gain)
    values = np.unique(p)
    cuts = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [np.nextafter(1, 2)]])  # always, between, never
    sums = np.array([gain[p >= cut].sum() for cut in cuts])
    best = np.flatnonzero(sums == sums.max())
    return float(cuts[best[len(best) // 2]])


# --- The command line. ---

PRESETS = {  # sizes alone; "all" for every script, the rest for the script of that name
    "toy": {
        "all": {"model": "data/toy/base", "asker_model": "data/toy/base", "truster_model": "data/toy/base",
                "k": 4, "shots": 0, "max_new_tokens": 96, "batch_tokens": 40000,
                "rank": 16, "lr": 2e-3, "max_length": 512, "save_steps": 50},
        "train_asker": {"batch_size": 32, "accumulate": 1, "task_epochs": 1, "epochs": 1},
        "train_truster": {"batch_size": 8, "accumulate": 1, "epochs": 1}},
    "t4": {
        "all": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "asker_model": "Qwen/Qwen2.5-1.5B",
                "truster_model": "Qwen/Qwen2.5-1.5B", "k": 4, "shots": 4, "max_new_tokens": 256, "batch_tokens": 16384,
                "rank": 16, "lr": 2e-4, "max_length": 512, "save_steps": 100},
        "train_asker": {"batch_size": 4, "accumulate": 8, "task_epochs": 2, "epochs": 1},
        "train_truster": {"batch_size": 1, "accumulate": 16, "epochs": 1}},
    "24gb": {
        "all": {"model": "Qwen/Qwen2.5-7B-Instruct", "asker_model": "NousResearch/Llama-2-7b-hf",
                "truster_model": "NousResearch/Llama-2-13b-hf", "k": 5, "shots": 8, "max_new_tokens": 256,
                "batch_tokens": 16384, "rank": 16, "lr": 2e-4, "max_length": 512, "save_steps": 100},
        "train_asker": {"batch_size": 8, "accumulate": 4, "task_epochs": 3, "epochs": 1},
        "train_truster": {"batch_size": 2, "accumulate": 8, "epochs": 1}},
}


def make_parser(llm=False, training=False, doc=None):
    """A parser with the flags that scripts share, and those of the LLM or of training; without `doc` to be a parent."""
    parser = argparse.ArgumentParser(add_help=bool(doc), description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="toy", choices=TASKS, help="what is asked (toy: needs no download)")
    add("--preset", default="toy", choices=PRESETS, help="sizes for a CPU, 16 GB or 24 GB (toy); flags win over it")
    add("--seed", type=int, default=0, help="of sampling, weights and data order (0)")
    add("--run", default="default", help="folder runs/<task>/<run> (default); samples are shared by the runs of a task")
    add("--runs", type=Path, default=ROOT / "runs",
        help="folder of all runs (runs in the kit; on Colab a local one, copied to Drive after)")
    add("--data", type=Path, default=ROOT / "data", help="folder of the tasks (data in the kit)")
    add("--limit", type=int, help="only the first N questions of each split (all)")
    add("--bits", type=int, default=4, choices=(4, 16, 32), help="of the frozen weights (4: nf4, fits small cards)")
    if llm:
        add("--model", help="the LLM: folder or Hub id (preset); with --base-url its name there")
        add("--base-url", help="of an OpenAI-compatible server that runs the LLM, such as http://localhost:8000/v1; "
                               "its key is read from OPENAI_API_KEY (none: the LLM runs here)")
        add("--concurrency", type=int, default=8, help="requests to that server at a time (8: most limits allow it)")
        add("--chat", default="auto", choices=("auto", "yes", "no"),
            help="chat template; auto: if there is one, and with --base-url (auto)")
        add("--shots", type=int, help="exemplars before each question (preset; toy: 0, as it was pretrained without)")
        add("--facts", default="refine", choices=("refine", "both", "none"),
            help="where StrategyQA's facts stand: to refine, as in the paper, or to predict too, as a control (refine)")
        add("--strategy", default="cot", choices=("cot", "decomp"),
            help="of the first answer: chain of thought, or sub-questions (cot)")
        add("--max-new-tokens", type=int, help="of an answer; longer ones are cut off and counted (preset)")
        add("--batch-tokens", type=int,
            help="of a batch with padding and new ones (preset; the LLM's are halved if memory runs out)")
    if training:
        add("--lr", type=float, help="peak learning rate (preset; 2e-4 is QLoRA's for 7B and 13B)")
        add("--rank", type=int, help="of the LoRA matrices (preset: 16; alpha is twice that)")
        add("--epochs", type=float, help="passes over the examples (preset)")
        add("--batch-size", type=int, help="examples (Asker) or questions (Truster) a step and device (preset)")
        add("--accumulate", type=int, help="batches added up before a step (preset)")
        add("--max-length", type=int, help="tokens; longer examples are left out and counted, never cut (preset)")
        add("--save-steps", type=int, help="steps between checkpoints (preset)")
        add("--report-to", default="none", help="tracker of transformers.Trainer, such as tensorboard or wandb (none)")
    return parser


def parse(parser, script, argv=None):
    """Arguments with the preset filled in; the preset's needs checked; everything seeded."""
    args = parser.parse_args(argv)
    if getattr(args, "base_url", None) and not args.model:
        raise UserError("--base-url needs --model NAME, the LLM's name on that server")
    preset = PRESETS[args.preset]
    for key, value in {**preset["all"], **preset.get(script, {})}.items():
        if getattr(args, key, value) is None:
            if key == "shots":  # a task may have fewer exemplars than the preset would show
                path = find_exemplars(args.task, args.data)
                value = min(value, len(read_jsonl(path))) if path.is_file() else 0
            setattr(args, key, value)
    if args.preset != "toy" and not torch.cuda.is_available():
        raise UserError(f"--preset {args.preset} needs a CUDA GPU and none is here: on a CPU use --preset toy, "
                        "with --model, --asker-model and --truster-model of your own if you like")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", args.run) or args.run == "stages":  # the folder of all runs' stages
        raise UserError("--run is a plain name, not stages: letters, digits, dot, hyphen, underscore")
    transformers.set_seed(args.seed)
    return args


def fingerprint(args, model, keys):
    """What makes an output: model, data, prompts and the arguments named by `keys`."""
    revision = "endpoint" if getattr(args, "base_url", None) else model_revision(model)  # not the address: servers move
    return {"task": args.task, "data_sha256": data_hash(args.task, data=args.data), "model": model,
            "revision": revision, "prompt_version": PROMPT_VERSION,
            **{key: getattr(args, key) for key in keys},
            **({"exemplars": short_hash(load_exemplars(args.task, args.shots, args.data))} if "shots" in keys else {})}


def sample(args):
    """Step 2 of the five: k predictions for every question of train and dev, and greedy drafts of dev (sample 0)."""
    train, dev = (load_task(args.task, split, args.limit, args.data) for split in ("train", "dev"))
    require_distinct(record["id"] for record in train + dev)
    path, began = args.runs / args.task / "samples.jsonl", time.time()

    @functools.cache
    def llm():
        about = json.loads(maker(path).read_text())
        if about.pop("k", None):  # not finished any more
            write_json(maker(path), about)
        lm = load_llm(args)
        print(f"{args.model}: {args.shots} exemplars, {'chat template' if lm.chat else 'plain text'}")
        return lm

    def rows(label, records, k, temperature, first=0):
        return stage(path, label, [record["id"] for record in records], lambda done: draw(
            llm(), args, records, k, temperature, args.seed, first, done=done), first + k)

    with lock(args.runs / args.task):
        claim(path, fingerprint(args, args.model, [*LLM_KEYS, "seed", "temperature"]))
        groups = rows("sample train", train, args.k, args.temperature)
        drafts = rows("draft dev", dev, 1, 0.0)
        rows("sample dev", dev, args.k, args.temperature, first=1)
        about = json.loads(maker(path).read_text())
        if "k" not in about:  # something was drawn, by this call or one that was stopped at its very end
            seconds = round(about.get("seconds", 0) + time.time() - began, 1)
            write_json(maker(path), {**about, "k": args.k, "seconds": seconds, "peak_memory": peak_memory()})
    made = [row for group in groups.values() for row in group]
    both = sum(len({row["correct"] for row in group}) == 2 for group in groups.values())
    show_record({"question": train[0]["question"], "gold": train[0]["answer"], **{
        f"sample {row['sample']} ({'right' if row['correct'] else 'wrong'})": row["text"]
        for row in groups[train[0]["id"]][:2]}})
    print(f"{path}: {len(made)} samples of {len(groups)} training questions, "
          f"{np.mean([r['correct'] for r in made]):.1%} right, {both} questions with both right and wrong samples, "
          f"{sum(r['answer'] is None for r in made)} without an answer, {sum(not r['stopped'] for r in made)} cut off, "
          f"{sum(r['tokens'] for r in made)} tokens; greedy drafts of {len(dev)} dev questions "
          f"{np.mean([group[0]['correct'] for group in drafts.values()]):.1%} right")


def subquestions(args):
    """Let the LLM write sub-questions from each training question and its gold solution, where a data set has none."""
    train, path = load_task(args.task, "train", args.limit, args.data), args.runs / args.task / "subquestions.jsonl"
    texts = [solution_text(record.get("solution", []), record["answer"]) for record in train]
    exemplars = load_exemplars(args.task, args.shots, args.data)
    with lock(args.runs / args.task):
        claim(path, fingerprint(args, args.model, LLM_KEYS))
        rows = stage(path, "sub-questions", [record["id"] for record in train], lambda done: ask(
            load_llm(args), args.task, train, texts, exemplars, done=done,
            max_new_tokens=args.max_new_tokens))
    counts = [len(row["subquestions"]) for (row,) in rows.values()]
    show_record({"question": train[0]["question"], "sub-questions": "\n".join(rows[train[0]["id"]][0]["subquestions"])})
    print(f"{path}: {np.mean(counts):.1f} sub-questions a question, none for {counts.count(0)} of {len(train)}; "
          "next: python train_asker.py --subquestions generated")


def show(value, form=".1%"):
    """A figure as text; "-" where there is none.

    >>> show(0.5), show(None)
    ('50.0%', '-')
    """
    return "-" if value is None else format(value, form)


def visible(text):
    r"""Text with its control characters made visible, so that it cannot steer a terminal.

    >>> print(visible("\x1b[2Jwiped"))
    \x1b[2Jwiped
    """
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def show_record(parts):
    """Print named texts, {name: text}."""
    for name, text in parts.items():
        print(f"  {name}: " + visible(str(text)).replace("\n", "\n" + " " * (len(name) + 4)))


def solve(args):
    """One question through the four steps, each printed as it comes."""
    record, shelf = [{"question": args.question}], Shelf(args)
    settings = {"exemplars": load_exemplars(args.task, args.shots, args.data), "max_new_tokens": args.max_new_tokens}
    about = {name: shelf.about(name) for name in ("asker", "truster")}  # missing ones are told before anything is made
    shift, threshold = about["asker"]["shift"], about["asker"]["threshold"]

    def first(batches):
        return next(batches)[0][1][0]

    show_record({"question": args.question})
    draft = first(predict(shelf.get("llm"), args.task, record, strategy=args.strategy, **settings))
    show_record({"1 predict": draft["text"]})
    with shelf.get("asker").use("asker") as asker:
        asked = first(ask(asker, args.task, record, [draft["text"]], shift=shift, max_new_tokens=args.max_new_tokens))
    wanted = asked["p_refine"] >= threshold
    show_record({"2 ask": "\n".join([*asked["subquestions"], f"{DECISION} {'Yes' if wanted else 'No'}  "
                                     f"(p_refine {asked['p_refine']:.2f}, threshold {threshold:.2f})"])})
    if wanted:
        refined = first(refine(shelf.get("llm"), args.task, record, [draft["text"]], [asked["subquestions"]],
                               **settings))
        show_record({"3 refine": refined["text"]})
        texts = {"initial": draft["text"], "refined": refined["text"]}
        scores = first(shelf.get("truster").score(record, [texts]))
        better = "refined" if scores["refined"] > scores["initial"] else "initial"
        show_record({"4 trust": f"initial {scores['initial']:.2f}, refined {scores['refined']:.2f}: {better}"})
        draft = {"initial": draft, "refined": refined}[better]
    show_record({"answer": "none could be read" if draft["answer"] is None else draft["answer"]})


def main():
    """`sample`, `subquestions` or `solve`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, call in (("sample", sample), ("subquestions", subquestions), ("solve", solve)):
        one = commands.add_parser(name, parents=[make_parser(llm=True)], help=call.__doc__, description=call.__doc__)
        one.set_defaults(call=call)
        if name == "sample":
            one.add_argument("--k", type=int, help="predictions a training question (preset)")
            one.add_argument("--temperature", type=float, default=0.7, help="of these (0.7: varied, still sensible)")
        elif name == "solve":
            one.add_argument("question", help="the question, in quotes")
    args = parse(parser, "art")
    args.call(args)


if __name__ == "__main__":
    run(main)
