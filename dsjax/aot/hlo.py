"""What a compiled program tells in its own text: collectives with counts and bytes, and its largest arrays."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dsjax.model.dispatch import EVERY_ROUND, LATER_ROUNDS

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_MACHINERY = {"", "train_step", "while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map"}
_MACHINERY |= {EVERY_ROUND, LATER_ROUNDS}


@dataclass(frozen=True)
class Collective:
    """One collective of the program, as one device sees it."""

    kind: str  # of KINDS
    bytes_sent: float  # by this device, along a ring or directly: each byte goes over one link once at least
    members: tuple[int, ...]  # of its first group, as device numbers


@dataclass(frozen=True)
class Array:
    """A large array of the program."""

    shape: str  # as in "bf16[58,3,4096,7168]"
    bytes: int
    source: str  # where in the model it was made


class Program:
    """A compiled module, read from its text.

    Loops count as often as they turn. Where the text does not say, the loop has a traced count: outside shard_map
    that is the loop over microbatches, of `while_trips`; inside it the rounds of a dispatch, of which there is one
    when all experts are equally busy, in the loop or before it.
    """

    def __init__(self, text: str, while_trips: int):
        self._while_trips = while_trips
        self._bodies: dict[str, list[str]] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                name = head[2]
                lines = self._bodies[name] = []
                if head[1]:
                    self._entry = name
            elif line.startswith(" "):
                lines.append(line)

    @cached_property
    def collectives(self) -> Counter[Collective]:
        """How often each runs in one step."""
        return self._inside(self._entry, {})

    def _inside(self, computation: str, known: dict[str, Counter[Collective]]) -> Counter[Collective]:
        if computation in known:
            return known[computation]
        found: Counter[Collective] = Counter()
        for line in self._bodies.get(computation, ()):
            if (one := _collective(line, computation)) is not None:
                found[one] += 1
            for called, times in self._called(line):
                for inner, count in self._inside(called, known).items():
                    found[inner] += times * count
        known[computation] = found
        return found

    def _called(self, line: str) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often."""
        if " while(" in line:
            trips = self._trips(line)
            yield from ((name, trips) for name in _CALLED.findall(line) if trips)
        elif not re.search(r" async-(update|done)\(", line):
            yield from ((name, 1) for name in _CALLED.findall(line))
            for names in _BRANCHES.findall(line):
                yield from ((name.strip().lstrip("%"), 1) for name in names.split(","))

    def _trips(self, line: str) -> int:
        if told := re.search(r'known_trip_count":?\{"n":"(\d+)"', line):
            return int(told[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self._bodies.get(condition[1], []) if condition else []
        bounds = [int(n) for one in lines for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", one)]
        if bounds:
            return max(bounds)
        name = _OP_NAME.search(line)
        if name and "shard_map/" in name[1]:
            return int(EVERY_ROUND in name[1])
        return self._while_trips

    def largest_arrays(self, count: int) -> list[Array]:
        """The largest arrays, each once however many instructions pass it on."""
        found: dict[str, Array] = {}
        for lines in self._bodies.values():
            for line in lines:
                instruction = _INSTRUCTION.match(line)
                # What is handed on in tuples was made somewhere else.
                if instruction is None or instruction[2].startswith("("):
                    continue
                array = _ARRAY.match(instruction[2])
                if array is None or array[0] in found:
                    continue
                name = _OP_NAME.search(line)
                if name or " parameter(" not in line:
                    found[array[0]] = Array(array[0], array_bytes(array[0]), readable(name[1]) if name else "")
        return sorted(found.values(), key=lambda one: -one.bytes)[:count]


def _collective(line: str, computation: str) -> Collective | None:
    """The collective that an instruction begins, or None; its end and what it waits for do not count."""
    found = re.search(rf" ({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(", line)
    if found is None or (instruction := _INSTRUCTION.match(line)) is None:
        return None
    kind, result = found[1], instruction[2][: found.start() - instruction.start(2)]
    if found[2] and kind != "all-reduce":
        result = _second(result)  # an asynchronous one holds ((operands), results)
    size, group = array_bytes(result), _members(line)
    count = len(group)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // count  # TPUs fuse one with the slice that follows
    others = (count - 1) / count
    sent = {
        "all-gather": size * others,
        "reduce-scatter": size * (count - 1),
        "all-reduce": 2 * size * others,
        "collective-permute": size,
    }.get(kind, size * others)
    return Collective(kind, sent, group)


def _second(tuple_type: str) -> str:
    """The second part of "(a, b, ...)"."""
    depth, commas = 0, []
    for place, letter in enumerate(tuple_type):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 1:
            commas.append(place)
    return tuple_type[commas[0] + 1 : commas[1] if len(commas) > 1 else None] if commas else tuple_type


def array_bytes(type_text: str) -> int:
    """Bytes of all arrays in a type, as in "(f32[2,3]{1,0}, bf16[4])"."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _bits(kind) // 8 for kind, dims in _ARRAY.findall(type_text)
    )


def _bits(kind: str) -> int:
    number = re.search(r"\d+", kind)
    return _BITS[kind] if kind in _BITS else int(number[0]) if number else 0


def _members(line: str) -> tuple[int, ...]:
    """The first group of devices that a collective joins; for a permutation the devices of its first step."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(int(n) for n in listed[1].split(","))
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return (int(pairs[1]), int(pairs[2]))
    if named := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        joined = re.findall(r"'(\w+)'", named[4])
        places, stride = [0], 1
        for name in reversed(sizes):
            if name in joined:
                places = [place + step * stride for step in range(sizes[name]) for place in places]
            stride *= sizes[name]
        return tuple(sorted(_device(place, named[2] or str(stride), named[3]) for place in places))
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", line):
        return tuple(_device(place, iota[3], iota[4]) for place in range(int(iota[2])))
    raise ValueError(f"a collective of unknown devices: {line.strip()[:200]}")


def _device(place: int, dims: str, order: str | None) -> int:
    """The number at `place` of 0, 1, ... laid out as an array of `dims` and read in another `order` of its axes."""
    sizes = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(sizes))
    number = 0
    for axis in reversed(axes):
        place, step = divmod(place, sizes[axis])
        number += step * math.prod(sizes[axis + 1 :])
    return number


def readable(op_name: str) -> str:
    """JAX's name of an operation without the machinery around it, as in "moe_layers/feed_forward, backward"."""
    is_backward, is_again = "transpose(" in op_name, "rematted_computation" in op_name
    name = re.sub(r"(?:transpose|jvp|vmap|jit)\(([^()]*)\)", r"\1", op_name)
    name = re.sub(r"(?:transpose|jvp|vmap|jit)\(([^()]*)\)", r"\1", name)
    parts = [part for part in name.split("/") if part not in _MACHINERY]
    short = "/".join(dict.fromkeys(parts[:1] + parts[-2:]))
    return short + (", computed again" if is_again else ", backward" if is_backward else "")
