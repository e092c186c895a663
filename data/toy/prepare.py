"""The toy task: word problems in the GSM8K shape, made from a seed. Nothing is downloaded.

    python data/toy/prepare.py                  # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/toy/prepare.py --test 200       # fewer of test; another --test-seed draws others

Every problem has traps that a careless reader falls into ("fewer" read as "more", the wrong person looked up, the last
sum left out) and some hold a basket that nobody asked about. `Reading` says how a text was read; a reading gives
sub-questions, steps and an answer. `Reading()` is the right one. pretrain.py uses other readings, this file never does.
"""

import argparse
import hashlib
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana Ivan Jill Kim Leo".split()
ITEMS = "apples pens books shells cards stamps coins roses kites cups hats nuts".split()
VERBS = [("pick", "picked"), ("buy", "bought"), ("find", "found"), ("make", "made"), ("sell", "sold")]


@dataclass
class Problem:
    """A given number, one or two relations (person, kind, number, index of the person referred to), and a question."""

    item: str
    verb: tuple[str, str]
    people: list[str]
    given: int
    relations: list[tuple[str, int, int]]  # kind, number, index into people of the person compared with
    together: bool
    age: int | None
    basket: int | None

    def text(self):
        """The question as the reader sees it."""
        base, past = self.verb
        lines = [f"{self.people[0]} {past} {self.given} {self.item}."]
        if self.age:
            lines[0] += f" {self.people[0]} is {self.age} years old."
        for person, (kind, number, other) in zip(self.people[1:], self.relations):
            lines.append(f"{person} {past} {_compare(kind, number, self.item)} {self.people[other]}.")
        if self.basket:
            lines.append(f"Another {self.basket} {self.item} lay in a basket.")
        who = " and ".join(self.people[-2:]) if self.together else self.people[-1]
        lines.append(f"How many {self.item} did {who} {base}{' together' if self.together else ''}?")
        return " ".join(lines)

    def kind(self):
        """The first trap in the text: a person to look up, "fewer", a sum at the end, or none."""
        traps = {"person": len(self.relations) == 2 and self.relations[1][2] == 0,
                 "fewer": any(kind == "fewer" for kind, _, _ in self.relations), "together": self.together}
        return next((trap for trap, there in traps.items() if there), "none")


@dataclass
class Reading:
    """How a text was read; the default reads it right."""

    flipped: tuple[bool, ...] = (False, False)  # "fewer" taken for "more", for each relation
    misplaced: bool = False  # the person named last taken for the one that the second relation refers to
    unfinished: bool = False  # the sum at the end left out
    basket: bool = False  # the basket added though nobody asked


def _compare(kind, number, item):
    return f"{number} times as many {item} as" if kind == "times" else f"{number} {kind} {item} than"


def solve(problem, reading):
    """[[sub-question, step], ...] and the answer that follow from a reading."""
    base, past = problem.verb
    item, people, counts, solution = problem.item, problem.people, [problem.given], []

    def add(asked, who, left, sign, right):
        counts.append({"+": left + right, "-": left - right, "*": left * right}[sign])
        solution.append([f"How many {item} {asked}?", f"{who} {left} {sign} {right} = {counts[-1]} {item}."])

    for index, (kind, number, other) in enumerate(problem.relations):
        if index == 1 and reading.misplaced:
            other = 1
        if kind == "fewer" and reading.flipped[index]:
            kind = "more"
        add(f"did {people[index + 1]} {base}, {_compare(kind, number, item)} {people[other]}",
            f"{people[index + 1]} {past}", counts[other], {"more": "+", "fewer": "-", "times": "*"}[kind], number)
    if problem.together and not reading.unfinished:
        add(f"did {' and '.join(people[-2:])} {base} together", f"Together they {past}", counts[-2], "+", counts[-1])
    if reading.basket:
        add("are there with the basket", "With the basket there are", counts[-1], "+", problem.basket)
    return solution, str(counts[-1])


def draw_problem(rng):
    """One problem whose every count stays between 1 and 99, however it is read."""
    while True:
        relations = []
        for index in range(rng.choice([1, 2, 2])):
            kind = rng.choices(["more", "fewer", "times"], [0.55, 0.2, 0.25])[0]
            number = rng.randint(2, 3) if kind == "times" else rng.randint(2, 9)
            relations.append((kind, number, 1 if index and rng.random() < 0.7 else 0))
        problem = Problem(rng.choice(ITEMS), rng.choice(VERBS), rng.sample(NAMES, len(relations) + 1),
                          rng.randint(3, 20), relations, rng.random() < 0.2,
                          rng.randint(5, 12) if rng.random() < 0.2 else None,
                          rng.randint(2, 9) if rng.random() < 0.25 else None)
        worlds = [solve(problem, Reading((flip, flip), place)) for flip in (0, 1) for place in (0, 1)]
        numbers = [int(word) for solution, _ in worlds for _, step in solution
                   for word in step.split() if word.lstrip("-").isdigit()]
        if min(numbers) >= 1 and max(numbers) <= 90:
            return problem


def for_pretraining(question):
    """Half of all questions, chosen by a hash of the text, may be seen in pretraining; the task uses the other half."""
    return hashlib.sha256(question.encode()).digest()[0] % 2 == 0


def make_split(name, size, seed, taken):
    """`size` records with questions in neither `taken` (updated) nor the pretraining half."""
    rng, records = random.Random(f"toy {name} {seed}"), []
    while len(records) < size:
        problem = draw_problem(rng)
        question = problem.text()
        if question not in taken and not for_pretraining(question):
            taken.add(question)
            solution, answer = solve(problem, Reading())
            records.append({"id": f"toy-{name}-{len(records)}", "kind": problem.kind(), "question": question,
                            "answer": answer, "solution": solution})
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the seed of test was drawn at random after the base model was frozen
    for name, size, seed in (("train", 1500, 0), ("dev", 300, 0), ("test", 1000, 43326)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"questions ({size}: minutes on a laptop)")
        parser.add_argument(f"--{name}-seed", type=int, default=seed, help=f"of {name} ({seed})")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder (data/toy)")
    args, taken = parser.parse_args(), set()
    for name in ("train", "dev", "test"):
        records = make_split(name, getattr(args, name), getattr(args, f"{name}_seed"), taken)
        art.write(args.out / f"{name}.jsonl", records)
        print(f"{args.out / name}.jsonl: {len(records)} questions, no text twice, none in the base model's pretraining")


if __name__ == "__main__":
    art.run(main)
