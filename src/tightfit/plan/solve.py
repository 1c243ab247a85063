"""Solves the program of :mod:`tightfit.plan.program` with scipy's HiGHS. For child processes: scipy takes 80 MiB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from tightfit.errors import TightfitError
from tightfit.plan.program import Aim, Answer, Choice, Table

GAP = 1e-3  # relative, of what is minimised: far below what sensitivities and speeds are known to
LEAST_SECONDS, MOST_SECONDS = 1e-6, 30.0
SHARES = (0.125, 0.25, 0.5, 1.0)  # of a group that may be on the disk at most: buffers are as large
# Units in which the solver's absolute tolerances are small; so is what is minimised.
MIB, NATS, SCALE = 1 << 20, 1e-4, 1e4
INFEASIBLE = 2


def solve_for_parent(question: dict[str, Any]) -> dict[str, Any]:
    tables = [_table(values) for values in question["tables"]]
    return {"answers": [answer and asdict(answer) for answer in solve(tables, [Aim(**a) for a in question["aims"]])]}


def _table(values: dict[str, Any]) -> Table:
    groups = tuple(tuple(Choice(**choice) for choice in group) for group in values["groups"])
    return Table(**values | {"groups": groups})


def solve(tables: Sequence[Table], aims: Sequence[Aim]) -> list[Answer | None]:
    """See :func:`tightfit.plan.program.solve`."""
    resident = [Program(index, table, 0.0) for index, table in enumerate(tables)]
    streaming = [
        Program(index, table, share)
        for index, table in enumerate(tables)
        for share in SHARES
        if any(choice.streamable for group in table.groups for choice in group)
    ]
    fastest: dict[Aim, Answer | None] = {}

    def best(aim: Aim) -> Answer | None:
        """Of the answers of all programs the best, of equal ones the first."""
        found: Answer | None = None
        for program in [*resident, *streaming] if aim.streams else resident:
            other = program.solve(aim, None if found is None else _value(aim, found))
            if other is not None and (found is None or _value(aim, other) < _value(aim, found)):
                found = other
        return found

    def answer(aim: Aim) -> Answer | None:
        if aim.relative:
            key = Aim(seconds=1.0, most_bytes=aim.most_bytes, streams=aim.streams)
            if key not in fastest:
                fastest[key] = best(key)
            least = fastest[key]
            if least is None:
                return None
            aim = replace(aim, relative=False, seconds=aim.seconds / max(least.seconds, LEAST_SECONDS))
        found = best(aim)
        if found is None or not aim.tie:
            return found
        limit = found.nats * (1 + aim.tie)
        limit = max(found.nats, limit if aim.tie_below is None else min(limit, aim.tie_below))
        return best(replace(aim, nats=0.0, seconds=1.0, tie=0.0, most_nats=limit)) or found

    return [answer(aim) for aim in aims]


def _value(aim: Aim, answer: Answer) -> float:
    """What is minimised."""
    return aim.nats * answer.nats + aim.seconds * answer.seconds + aim.nbytes * answer.nbytes


@dataclass
class Row:
    """``low <= sum of coefficient * variable <= high``"""

    coefficients: dict[int, float]
    low: float = -np.inf
    high: float = np.inf


class Program:
    """The program of one table, where at most ``share`` of each group may be on the disk.

    Groups with the same choices are one class, of which is counted how many take which: equal layers would else make
    as many equal answers as there are ways to order them.
    """

    def __init__(self, index: int, table: Table, share: float) -> None:
        self.index, self.table, self.share = index, table, share
        self.fixed = table.nbytes + (table.readers + share * table.buffers if share else 0)
        self.classes = Counter(table.groups)
        self.variables = [(kind, choice) for kind in self.classes for choice in range(len(kind))]
        columns = [kind[choice] for kind, choice in self.variables]
        self.nbytes, self.nats, self.prefill, self.decode, self.streamable = (
            np.array([getattr(column, name) for column in columns], dtype=float)
            for name in ("nbytes", "nats", "prefill", "decode", "streamable")
        )
        # After the choices: MiB on the disk, and seconds of both phases.
        self.count = len(columns)
        self.on_disk, self.of_prefill, self.of_decode = range(self.count, self.count + 3)
        self.size = self.count + 3

    def solve(self, aim: Aim, better_than: float | None = None) -> Answer | None:
        """The best answer; None where there is none, or none can have a sum below ``better_than``."""
        objective = np.zeros(self.size)
        objective[: self.count] = aim.nats * self.nats + aim.nbytes * self.nbytes
        objective[self.on_disk] = -aim.nbytes * MIB
        objective[[self.of_prefill, self.of_decode]] = aim.seconds
        objective *= SCALE
        constraint = _constraint(self._rows(aim), self.size)
        bounds = Bounds(0.0, np.r_[[self.classes[kind] for kind, _ in self.variables], np.full(3, np.inf)])
        if better_than is not None:  # less than this the sum cannot be
            bound = milp(objective, constraints=constraint, bounds=bounds)
            least = np.inf if bound.status == INFEASIBLE else bound.fun / SCALE + aim.nbytes * self.fixed
            if least >= better_than * (1 - GAP):
                return None
        found = milp(
            objective,
            constraints=constraint,
            bounds=bounds,
            integrality=np.r_[np.ones(self.count), np.zeros(3)],
            options={"mip_rel_gap": GAP, "time_limit": MOST_SECONDS},
        )
        if found.status == INFEASIBLE:
            return None
        if not found.success:
            raise TightfitError(f"the solver found no plan: {found.message}", "Please report this.")
        return self._answer(found.x)

    def _rows(self, aim: Aim) -> list[Row]:
        table, rows, begin = self.table, [], 0
        for kind, groups in self.classes.items():
            rows.append(Row(dict.fromkeys(range(begin, begin + len(kind)), 1.0), groups, groups))
            begin += len(kind)
        for phase, seconds, fixed, of_byte in (
            (self.of_prefill, self.prefill, table.prefill, table.stream_prefill),
            (self.of_decode, self.decode, table.decode, table.stream_decode),
        ):
            rows.append(Row({phase: 1.0} | dict(enumerate(-seconds)), low=fixed))
            rows.append(Row({phase: 1.0, self.on_disk: -of_byte * MIB}, low=0.0))
        rows.append(Row({self.on_disk: 1.0} | dict(enumerate(-self.share * self.streamable / MIB)), high=0.0))
        if aim.most_bytes is not None:
            taken = dict(enumerate(self.nbytes / MIB)) | {self.on_disk: -1.0}
            rows.append(Row(taken, high=(aim.most_bytes - self.fixed) / MIB))
        if aim.most_nats is not None:
            rows.append(Row(dict(enumerate(self.nats / NATS)), high=aim.most_nats / NATS))
        if aim.most_seconds is not None:
            rows.append(Row({self.of_prefill: 1.0, self.of_decode: 1.0}, high=aim.most_seconds))
        return rows

    def _answer(self, x: np.ndarray) -> Answer:
        counts = np.round(x[: self.count])
        left: dict[tuple[Choice, ...], list[int]] = {kind: [] for kind in self.classes}
        for (kind, choice), groups in zip(self.variables, counts, strict=True):
            left[kind] += [choice] * int(groups)
        streamed, table = float(x[self.on_disk]) * MIB, self.table
        prefill = max(table.prefill + float(self.prefill @ counts), table.stream_prefill * streamed)
        decode = max(table.decode + float(self.decode @ counts), table.stream_decode * streamed)
        return Answer(
            self.index,
            tuple(left[kind].pop(0) for kind in table.groups),
            round(streamed),
            float(self.nats @ counts),
            prefill + decode,
            round(self.fixed + float(self.nbytes @ counts) - streamed),
        )


def _constraint(rows: Sequence[Row], size: int) -> LinearConstraint:
    entries = [(i, index, value) for i, row in enumerate(rows) for index, value in row.coefficients.items() if value]
    where, which, values = zip(*entries, strict=True)
    matrix = coo_array((values, (where, which)), shape=(len(rows), size)).tocsr()
    return LinearConstraint(matrix, [row.low for row in rows], [row.high for row in rows])
