"""The toy task: word problems in the GSM8K shape, made from a seed. Nothing is downloaded.

    python data/toy/prepare.py                  # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/toy/prepare.py --test 200       # fewer of test; another --test-seed draws others

Every text sets one trap, which is its kind. Who falls into it reads one sentence wrong, and the answer is wrong:

    sign        "Ben picked 4 fewer than Ann" is read as 4 more
    number      "Ben picked 3 more than Ann" is read as 8 more: 3 and 8, and 5 and 6, look alike
    person      "Cleo picked 4 more than Ann" is read as 4 more than Ben, who was named last
    slip        a sum that passes a ten: 28 + 4 = 22, the carry is forgotten

In a quarter of the texts "another 7 pens lay in a basket", which nobody asked about; some add them at the end.
The text shows the trap, but not who falls into it. So no text says whether a draft is right: one has to read the draft.
`solve` gives what follows from a text, read right or trapped. pretrain.py uses both, this file the right one alone.
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

NAMES = "Ann Ben Cleo Dan".split()
ITEMS = "apples pens books shells cards stamps coins roses kites cups hats nuts".split()
VERBS = [("pick", "picked"), ("buy", "bought"), ("find", "found"), ("make", "made"), ("sell", "sold")]
KINDS = ("sign", "number", "person", "slip")
# name: questions, seed; that of test was drawn at random after the base model was frozen
SPLITS = {"train": (1500, 0), "dev": (300, 0), "test": (1000, 47969)}
MISREAD = {"fewer": "more", 3: 8, 8: 3, 5: 6, 6: 5}
PLAIN = [2, 4, 7, 9]  # numbers that nobody misreads


@dataclass
class Problem:
    """Somebody's number, a relation for each of two further people, and a question about the last or the last two."""

    kind: str  # of KINDS
    item: str
    verb: tuple[str, str]
    people: list[str]
    given: int
    relations: list[list]  # ["more" or "fewer", by how many, index into people of whom it is than]
    place: int  # index into relations of the one that the trap is in
    together: bool
    basket: int | None  # what lies in it

    def text(self):
        """The question as the reader sees it."""
        base, past = self.verb
        lines = [f"{self.people[0]} {past} {self.given} {self.item}."]
        for index, (word, number, other) in enumerate(self.relations):
            lines.append(f"{self.people[index + 1]} {past} {number} {word} than {self.people[other]}.")
        if self.basket:
            lines.append(f"Another {self.basket} {self.item} lay in a basket.")
        who = " and ".join(self.people[-2:]) if self.together else self.people[-1]
        lines.append(f"How many {self.item} did {who} {base}{' together' if self.together else ''}?")
        return " ".join(lines)


def solve(problem, trapped=False, basket=False):
    """[[sub-question, step], ...] and the answer that follow from a reading; `basket`: what lies in it is added."""
    base, past = problem.verb
    item, people, counts, solution = problem.item, problem.people, [problem.given], []

    def add(asked, said, left, sign, right, slip=False):
        counts.append((left + right if sign == "+" else left - right) - (10 if slip else 0))
        solution.append([f"How many {item} {asked}?", f"{said}: {left} {sign} {right} = {counts[-1]}."])

    for index, (word, number, other) in enumerate(problem.relations):
        trap = problem.kind if trapped and index == problem.place else ""
        word = MISREAD[word] if trap == "sign" else word
        number = MISREAD[number] if trap == "number" else number
        other = index if trap == "person" else other
        who, said = people[index + 1], f"{number} {word} than {people[other]}"
        add(f"did {who} {base}, {said}", f"{who} {past} {said}", counts[other], "+" if word == "more" else "-", number,
            trap == "slip")
    if problem.together:
        add(f"did {' and '.join(people[-2:])} {base} together", "Together", counts[-2], "+", counts[-1])
    if problem.basket and basket:
        add("are there with the basket", "With the basket", counts[-1], "+", problem.basket)
    return solution, str(counts[-1])


def draw_problem(rng):
    """A problem with one trap, which changes the answer; in both readings all numbers stay between 1 and 99."""
    kind = rng.choice(KINDS)
    while True:
        place = rng.randrange(2)
        relations = [["more", rng.choice(PLAIN), index] for index in range(2)]
        if kind == "sign":
            relations[place][0] = "fewer"
        elif kind == "number":
            relations[place][1] = rng.choice([3, 5, 6, 8])
        elif kind == "person":
            place, relations[1][2] = 1, 0
        together = kind == "person" or rng.random() < 0.3  # with a person asked for both, so that every sentence counts
        problem = Problem(kind, rng.choice(ITEMS), rng.choice(VERBS), rng.sample(NAMES, 3), rng.randint(18, 40),
                          relations, place, together, rng.choice(PLAIN) if rng.random() < 0.25 else None)
        readings = [solve(problem, trapped, True) for trapped in (False, True)]
        numbers = [int(word) for solution, _ in readings for _, step in solution for word in re.findall(r"-?\d+", step)]
        between = problem.given + relations[0][1]
        passes_ten = [problem.given % 10 + relations[0][1] >= 10, between % 10 + relations[1][1] >= 10]
        possible = kind != "slip" or passes_ten == [place == 0, place == 1]  # the trapped sum does, the other does not
        if possible and min(numbers) >= 1 and max(numbers) <= 99 and readings[0][1] != readings[1][1]:
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
            solution, answer = solve(problem)
            records.append({"id": f"toy-{name}-{len(records)}", "kind": problem.kind, "question": question,
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
