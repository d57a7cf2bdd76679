"""Rounds of random faults on a cluster of three nodes on this machine, each compared with an undisturbed run.

Every fault at every stage comes once, in random order, before any comes again.

    python -m benchmarks.chaos [--rounds 50] [--seed 0] [--json]

`rounds` were played, `finished` ended with a result, `equal` with that of the undisturbed run (files to the bit, the
student to 1e-4); `redone_share` is the mean, over rounds, of units of work that were begun again over all units. 1 to 2
minutes a round on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.chaos.rounds import FAULTS, Result, make_inputs, moments_of, play


def are_equal(one: Result, other: Result) -> bool:
    return (
        one.hashes == other.hashes
        and one.student.keys() == other.student.keys()
        and all(np.allclose(one.student[name], other.student[name], atol=1e-4) for name in other.student)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    chance, finished, equal, shares = random.Random(asked.seed), 0, 0, []
    told = sys.stderr if asked.json else sys.stdout
    deck: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        words = make_inputs(Path(scratch, "inputs"))
        undisturbed = play(words, Path(scratch, "undisturbed"))
        for number in range(asked.rounds):
            if not deck:
                deck = [(fault, moment) for fault in FAULTS for moment in moments_of(fault)]
                chance.shuffle(deck)
            (fault, moment), count, begun = deck.pop(), chance.randint(1, 6), time.monotonic()
            try:
                result = play(words, Path(scratch, f"round-{number}"), fault, moment, count)
            except Exception as error:  # one round that fails, of itself or of its fault, is no end of the others
                print(f"{number + 1}: {fault} at {moment} {count}: {error}", file=told, flush=True)
                continue
            same = are_equal(result, undisturbed)
            finished, equal = finished + 1, equal + same
            shares.append(result.redone_share)
            work = f"{result.redone} of {result.units} units again, {len(result.errors) + 1} command(s)"
            outcome = f"{'equal' if same else 'DIFFERENT'}, {work}, {time.monotonic() - begun:.0f} s"
            print(f"{number + 1}: {fault} at {moment} {count}: {outcome}", file=told, flush=True)
    redone = sum(shares) / len(shares) if shares else 0.0
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "finished": finished, "equal": equal, "redone_share": redone}))
    else:
        print(f"{asked.rounds} rounds, {finished} finished, {equal} equal, {redone:.1%} of the work redone")


if __name__ == "__main__":
    main()
