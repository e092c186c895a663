"""The toy task: word problems in the shape of GSM8K, made from a seed. Nothing is downloaded.

    python data/toy/prepare.py               # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/toy/prepare.py --test 200    # fewer test questions; --test-seed draws others
    python data/toy/prepare.py --student 17  # train and test of one's own, for coursework

Every question has one trap, its kind. A writer who falls into it misreads one sentence:

    sign      "Ben has 14 fewer than Ann" is read as 14 more
    number    "Ben has 13 more than Ann" is read as 18 more: 13 and 18, or 25 and 26, look alike

The question alone does not reveal whether a draft is incorrect. The data have
correct solutions only; pretrain.py also writes incorrect ones.
"""

import argparse
import hashlib
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

NAMES = ["Ann", "Ben", "Cleo", "Dan"]
ITEMS = "apples pens books shells cards stamps coins roses kites cups hats nuts".split()
KINDS = ["sign", "number"]
LOOK_ALIKE = {13: 18, 18: 13, 25: 26, 26: 25}
PLAIN = [12, 14, 17, 21, 24, 27, 29]  # numbers that nobody misreads
# name: (questions, seed); the seed of test was drawn after the base models were frozen
SPLITS = {"train": (1500, 0), "dev": (300, 0), "test": (1000, 32436)}


@dataclass
class Problem:
    """What the first person has, how the next ones compare, and who is asked for."""

    kind: str  # of KINDS
    item: str
    people: list[str]
    given: int  # what the first person has
    relations: list[list]  # ["more" or "fewer", by how many] than the person before
    place: int  # index of the relation that has the trap
    together: bool  # the last two people are asked for, not the last one alone

    def text(self):
        """The question."""
        people = self.people
        text = f"{people[0]} has {self.given} {self.item}. "
        for before, who, (word, number) in zip(people, people[1:], self.relations):
            text += f"{who} has {number} {word} than {before}. "
        who = f"do {people[-2]} and {people[-1]} have together"
        return f"{text}How many {self.item} {who if self.together else f'does {people[-1]} have'}?"


def solve(problem, trapped=False, early=False, slip=False):
    """([[sub-question, step], ...], answer) of a writer.

    trapped: one sentence is misread. early: the last step is missing. slip: the last sum is ten
    too small.
    """
    people, counts, steps = problem.people, [problem.given], []
    for index, (word, number) in enumerate(problem.relations):
        if trapped and index == problem.place:
            word = "more" if problem.kind == "sign" else word
            number = LOOK_ALIKE[number] if problem.kind == "number" else number
        who, than = people[index + 1], f"{number} {word} than {people[index]}"
        left, sign = counts[-1], "+" if word == "more" else "-"
        steps.append((f"does {who} have, {than}", f"{who} has {than}: {left} {sign} {number}"))
        counts.append(left + number if word == "more" else left - number)
    if problem.together:
        steps.append((f"do {people[-2]} and {people[-1]} have together",
                      f"Together: {counts[-2]} + {counts[-1]}"))
        counts.append(counts[-2] + counts[-1])
    if early:
        del steps[-1], counts[-1]
    if slip:
        counts[-1] -= 10
    solution = [[f"How many {problem.item} {asked}?", f"{step} = {count}."]
                for (asked, step), count in zip(steps, counts[1:])]
    return solution, str(counts[-1])


def draw_problem(rng, size=2):
    """A problem of `size` relations whose trap changes the answer; all numbers are 11 to 199."""
    while True:
        kind, place = rng.choice(KINDS), rng.randrange(size)
        relations = [["more", rng.choice(PLAIN)] for _ in range(size)]
        if kind == "sign":
            relations[place][0] = "fewer"
        else:
            relations[place][1] = rng.choice(list(LOOK_ALIKE))
        problem = Problem(kind, rng.choice(ITEMS), rng.sample(NAMES, size + 1),
                          rng.randint(30, 50), relations, place, rng.random() < 0.3)
        readings = [solve(problem, trapped) for trapped in (False, True)]
        numbers = [int(number) for number in re.findall(r"\d+", str(readings))]
        if min(numbers) >= 11 and max(numbers) <= 199 and readings[0][1] != readings[1][1]:
            return problem


def for_pretraining(question):
    """Half of all questions, chosen by a hash, are for pretraining; the task has the others."""
    return hashlib.sha256(question.encode()).digest()[0] % 2 == 0


def make_split(name, size, seed, taken):
    """`size` records with questions that are not in `taken`, to which they are added."""
    rng, records = random.Random(f"toy {name} {seed}"), []
    own = "" if seed == SPLITS[name][1] else f"{seed}-"  # other questions have other ids
    while len(records) < size:
        problem = draw_problem(rng)
        question = problem.text()
        if question not in taken and not for_pretraining(question):
            taken.add(question)
            solution, answer = solve(problem)
            records.append({"id": f"toy-{own}{name}-{len(records)}", "kind": problem.kind,
                            "question": question, "answer": answer, "solution": solution})
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, taken, here = parser.add_argument, set(), Path(__file__).resolve().parent
    for name, (size, seed) in SPLITS.items():
        add(f"--{name}", type=int, default=size, help=f"questions ({size})")
        add(f"--{name}-seed", type=int, default=seed, help=f"seed of {name} ({seed})")
    add("--student", type=int, metavar="N", help="seed of train and test, for a student's own data")
    add("--out", type=Path, default=here, help="output folder (data/toy)")
    args = parser.parse_args()
    if args.student is not None:
        parser.set_defaults(train_seed=args.student, test_seed=args.student)
        args = parser.parse_args()  # --test-seed goes before it
    for name in SPLITS:
        size, seed = getattr(args, name), getattr(args, f"{name}_seed")
        art.write(args.out / f"{name}.jsonl", make_split(name, size, seed, taken))
        print(f"{args.out / name}.jsonl: {size} questions, all different, none from pretraining")


if __name__ == "__main__":
    art.run(main)
