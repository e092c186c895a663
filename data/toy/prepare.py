"""The toy task: word problems in the GSM8K shape, made from a seed. Nothing is downloaded.

    python data/toy/prepare.py                  # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/toy/prepare.py --test 200       # fewer of test; another --test-seed draws others

Every text sets one trap, which is its kind. Who falls into it reads one sentence wrong, and the answer is wrong:

    reversed    "Ann picked 4 more pens than Ben", where Ben is to be found: he has 4 fewer, not 4 more
    person      "Cleo picked 2 more pens than Ann", where Ben was the last one named
    number      "Ben, who is 7 years old, picked 2 more pens": the 7 is taken for the 2
    basket      "Another 5 pens lay in a basket", which nobody asked about

Beside that, every sum that passes a ten can slip: 18 + 5 = 13 forgets the carry, 12 - 4 = 18 forgets to borrow. So no
text says whether a draft is right: one has to read the draft. `Reading` says how somebody read and reckoned, `solve`
what follows. `Reading()` is the right one. pretrain.py uses other readings, this file never does.
"""

import argparse
import hashlib
import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana Ivan Jill Kim Leo".split()
ITEMS = "apples pens books shells cards stamps coins roses kites cups hats nuts".split()
VERBS = [("pick", "picked"), ("buy", "bought"), ("find", "found"), ("make", "made"), ("sell", "sold")]
KINDS = ("reversed", "person", "number", "basket")
# name: questions, seed; that of test was drawn at random after the base model was frozen
SPLITS = {"train": (1500, 0), "dev": (300, 0), "test": (1000, 43326)}
SLIPS = [(), *itertools.combinations(range(5), 1), range(5)]  # steps in which tens may be forgotten: none, one, all
OPPOSITE = {"more": "fewer", "fewer": "more"}


@dataclass
class Problem:
    """Somebody's number, one relation for each further person, and a question about the last or the last two."""

    kind: str  # of KINDS
    item: str
    verb: tuple[str, str]
    people: list[str]
    given: int
    relations: list[tuple[str, int, int]]  # "more" or "fewer", by how many, index into people of whom it is than
    place: int  # index into relations of the one that the trap is in
    together: bool
    extra: int  # the age, or what lies in the basket; only these two kinds of text say it

    def text(self):
        """The question as the reader sees it."""
        base, past = self.verb
        lines = [f"{self.people[0]} {past} {self.given} {self.item}."]
        for index, (word, number, other) in enumerate(self.relations):
            who, whom = self.people[index + 1], self.people[other]
            if index == self.place and self.kind == "reversed":
                who, whom, word = whom, who, OPPOSITE[word]
            if index == self.place and self.kind == "number":
                who += f", who is {self.extra} years old,"
            lines.append(f"{who} {past} {number} {word} {self.item} than {whom}.")
        if self.kind == "basket":
            lines.append(f"Another {self.extra} {self.item} lay in a basket.")
        who = " and ".join(self.people[-2:]) if self.together else self.people[-1]
        lines.append(f"How many {self.item} did {who} {base}{' together' if self.together else ''}?")
        return " ".join(lines)


@dataclass(frozen=True)
class Reading:
    """How somebody read and reckoned; the default is right."""

    trapped: bool = False
    carries: frozenset[int] = frozenset()  # steps in which a carry is forgotten, if there is one
    borrows: frozenset[int] = frozenset()  # the same for what a step has to borrow


def passes_ten(left, sign, right):
    """Does a sum carry, or borrow?"""
    return left % 10 + right % 10 >= 10 if sign == "+" else left % 10 < right % 10


def solve(problem, reading):
    """[[sub-question, step], ...] and the answer that follow from a reading."""
    base, past = problem.verb
    item, people, counts, solution = problem.item, problem.people, [problem.given], []

    def add(asked, who, left, sign, right):
        result = left + right if sign == "+" else left - right
        forgotten = reading.carries if sign == "+" else reading.borrows
        if len(solution) in forgotten and passes_ten(left, sign, right):
            result += -10 if sign == "+" else 10
        counts.append(result)
        solution.append([f"How many {item} {asked}?", f"{who} {left} {sign} {right} = {result} {item}."])

    for index, (word, number, other) in enumerate(problem.relations):
        if reading.trapped and index == problem.place:
            word = OPPOSITE[word] if problem.kind == "reversed" else word
            other = index if problem.kind == "person" else other
            number = problem.extra if problem.kind == "number" else number
        add(f"did {people[index + 1]} {base}, {number} {word} than {people[other]}",
            f"{people[index + 1]} {past}", counts[other], {"more": "+", "fewer": "-"}[word], number)
    if problem.together:
        add(f"did {' and '.join(people[-2:])} {base} together", f"Together they {past}", counts[-2], "+", counts[-1])
    if reading.trapped and problem.kind == "basket":
        add("are there with the basket", "With the basket there are", counts[-1], "+", problem.extra)
    return solution, str(counts[-1])


def draw_problem(rng):
    """One problem; in every reading all numbers stay between 1 and 99, and the trap changes the answer."""
    while True:
        kind, n = rng.choice(KINDS), rng.choice([2, 3])
        relations = [(rng.choices(["more", "fewer"], [0.78, 0.22])[0], rng.randint(2, 7), index) for index in range(n)]
        place = rng.randrange(n)
        if kind == "person":  # the last sentence goes back, and the question is about two: so every sentence counts
            place = n - 1
            relations[place] = (*relations[place][:2], rng.randrange(place))
        problem = Problem(kind, rng.choice(ITEMS), rng.choice(VERBS), rng.sample(NAMES, n + 1), rng.randint(5, 25),
                          relations, place, kind == "person" or rng.random() < 0.4, rng.randint(5, 12))
        readings = [Reading(trapped, slip, slip) for trapped in (False, True) for slip in map(frozenset, SLIPS)]
        numbers = [int(word) for reading in readings for _, step in solve(problem, reading)[0]
                   for word in step.split() if word.lstrip("-").isdigit()]
        right, trapped = (solve(problem, reading)[1] for reading in (Reading(), Reading(True)))
        if min(numbers) >= 1 and max(numbers) <= 99 and right != trapped:
            return problem


def for_pretraining(question):
    """Half of all questions, chosen by a hash of the text, may be seen in pretraining; the task uses the other half."""
    return hashlib.sha256(question.encode()).digest()[0] % 2 == 0


def draw_split(name, size, seed, taken):
    """`size` problems with questions in neither `taken` (updated) nor the pretraining half."""
    rng, problems = random.Random(f"toy {name} {seed}"), []
    while len(problems) < size:
        problem = draw_problem(rng)
        question = problem.text()
        if question not in taken and not for_pretraining(question):
            taken.add(question)
            problems.append(problem)
    return problems


def make_split(name, size, seed, taken):
    """The records of a split."""
    records = []
    for index, problem in enumerate(draw_split(name, size, seed, taken)):
        solution, answer = solve(problem, Reading())
        records.append({"id": f"toy-{name}-{index}", "kind": problem.kind, "question": problem.text(),
                        "answer": answer, "solution": solution})
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (size, seed) in SPLITS.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"questions ({size}: minutes on a laptop)")
        parser.add_argument(f"--{name}-seed", type=int, default=seed, help=f"of {name} ({seed})")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder (data/toy)")
    args, taken = parser.parse_args(), set()
    for name in SPLITS:
        records = make_split(name, getattr(args, name), getattr(args, f"{name}_seed"), taken)
        art.write(args.out / f"{name}.jsonl", records)
        print(f"{args.out / name}.jsonl: {len(records)} questions, no text twice, none in the base model's pretraining")


if __name__ == "__main__":
    art.run(main)
