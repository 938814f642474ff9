"""Writes single facts of arithmetic as text to pretrain on: `python launch/arithmetic_facts.py FILE [LIMIT]`.

Every `a+b=c`, `a-b=c` and `a*b=c` with b from 1 to 9 and results from 0 to LIMIT (default 20), many times over, in
lines of some each, shuffled by a fixed seed.
"""

import random
import sys

REPEATS, FACTS_IN_A_LINE = 60, 12


def facts(limit: int) -> list[str]:
    found = []
    for a in range(limit + 1):
        for b in range(1, 10):
            found += [f"{a}{sign}{b}={c}" for sign, c in (("+", a + b), ("-", a - b), ("*", a * b)) if 0 <= c <= limit]
    return found


def main(file: str, limit: str = "20") -> None:
    every, draw = facts(int(limit)) * REPEATS, random.Random(0)
    draw.shuffle(every)
    with open(file, "w", encoding="utf-8") as out:
        for start in range(0, len(every), FACTS_IN_A_LINE):
            out.write(";".join(every[start : start + FACTS_IN_A_LINE]) + "\n")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
