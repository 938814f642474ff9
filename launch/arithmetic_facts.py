"""Writes text to pretrain a calculating model on: `python launch/arithmetic_facts.py FILE [LIMIT]`.

Two kinds of lines, shuffled by a fixed seed. Facts: every `a+b=c`, `a-b=c` and `a*b=c` with b from 1 to 9 and results
from 0 to LIMIT (default 20). Copies: a chain such as `8*2-4+3`, a bar, and its parts again, each behind a number that
has nothing to do with it, `8*2 17-4 5+3`: text that repeats itself, as text does. No chain is ever worked off.
"""

import random
import sys

REPEATS, FACTS_IN_A_LINE, COPIES = 60, 12, 6000


def facts(limit: int) -> list[str]:
    found = []
    for a in range(limit + 1):
        for b in range(1, 10):
            found += [f"{a}{sign}{b}={c}" for sign, c in (("+", a + b), ("-", a - b), ("*", a * b)) if 0 <= c <= limit]
    return found


def copy(draw: random.Random, limit: int) -> str:
    parts = [f"{draw.choice('+-*')}{draw.randint(1, 9)}" for _ in range(draw.randint(2, 6))]
    first = draw.randint(0, 9)
    again = " ".join(f"{draw.randint(0, limit) if i else first}{part}" for i, part in enumerate(parts))
    return f"{first}{''.join(parts)}|{again}"


def main(file: str, limit: str = "20") -> None:
    draw, every = random.Random(0), facts(int(limit)) * REPEATS
    draw.shuffle(every)
    lines = [";".join(every[start : start + FACTS_IN_A_LINE]) for start in range(0, len(every), FACTS_IN_A_LINE)]
    lines += [copy(draw, int(limit)) for _ in range(COPIES)]
    draw.shuffle(lines)
    with open(file, "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
