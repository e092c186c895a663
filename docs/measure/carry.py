"""Carry answers of version 2 (commit 77d4ab9) into the cache of this one.

    python docs/measure/carry.py SAID.jsonl --task gsm8k --limit-train 600 --model FOLDER \
        --bits 16 --k 4                     # samples; with --drafts --split test: drafts

Both versions ask the LLM for a draft with the same prompt. An answer is carried over if the prompt,
as the model reads it, the number of the sample and the temperature are the same. Give the model
that wrote the file: its weights are not compared.
"""

import functools
import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art


def read_said(path):
    """{temperature: {(hash of the prompt, number): output}} of a cache file of version 2."""
    opened = gzip.open if path.suffix == ".gz" else open
    settings, found = {}, {}
    with opened(path, "rt", encoding="utf-8") as file:
        for line in filter(str.strip, file):
            one = json.loads(line)
            if "are" in one:
                settings[one["settings"]] = one["are"]
                continue
            are = settings[one["settings"]]
            if are["kind"] == "generate":
                own = found.setdefault(are["temperature"], {})
                own[one["prompt"], one["number"]] = {
                    "text": one["text"], "finished": one["stopped"], "tokens": one["tokens"],
                    "logprob": one["logprob"], "prompt_tokens": one["prompt_tokens"]}
    return found


def main():
    parser = art.make_parser(__doc__, "sample")
    parser.add_argument("said", type=Path, help="the cache file, .jsonl or .jsonl.gz")
    parser.add_argument("--split", default="train", choices=("train", "dev", "test"))
    parser.add_argument("--drafts", action="store_true", help="carry drafts, not samples")
    args = art.parse(parser, remember=False)
    llm = art.open_model(args, "llm")
    temperature = args.draft_temperature if args.drafts else args.temperature
    numbers = [0] if args.drafts else range(args.k)
    said = read_said(args.said).get(temperature, {})

    @functools.cache
    def old_hash(prompt):
        ids, _ = llm.tokens(prompt, "")
        return art.short_hash(llm.tokenizer.decode(ids))

    def compute(missing, settings):
        for key, (prompt, _, number) in missing.items():
            output = said[old_hash(prompt), number]
            yield {key: {**output, "text": art.up_to(settings["stop"], output["text"])}}

    llm.compute = compute  # in place of the model: what version 2 has said
    records = []
    for record in art.load_split(args, args.split):
        prompt = art.predict_prompt(record, args.strategy)
        prompt = art.render(llm, args, prompt, args.strategy)
        if all((old_hash(prompt), number) in said for number in numbers):
            records.append(record)
    if records:
        art.sample_answers(llm, args, records, numbers, temperature)
    print(f"{len(records):,} questions with {len(numbers)} answers each are in "
          f"{args.shared / 'answers.sqlite'}")


if __name__ == "__main__":
    art.run(main)
