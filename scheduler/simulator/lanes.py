"""The lanes of one layer in compiled code: durations and dependencies in, start and end times out.

CPU and link both read host memory: while both run, each keeps a share of its rate. Accelerator and link work in
first-in-first-out order; an accelerator task waits for its copy, a copy waits for the last reader of its slot.
Times are microseconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEVER_US = 1e30
#: Below this a task counts as finished (rounding of repeated subtraction).
DONE_US = 1e-9


@compiled
def run_lanes(
    now_us: float,
    cpu_us: Floats,
    cpu_from: Floats,
    accel_us: Floats,
    accel_wait: Ints,
    accel_ready_us: float,
    link_left: Floats,
    link_after: Ints,
    link_from: Floats,
    cpu_rate: float,
    link_rate: float,
    cpu_start: Floats,
    cpu_end: Floats,
    accel_start: Floats,
    accel_end: Floats,
    link_start: Floats,
    link_end: Floats,
) -> float:
    """Run until both compute lanes are done; returns that time, or -1 when the tasks wait for each other.

    cpu_us, accel_us [n]: durations in lane order; cpu_from [n]: earliest start; accel_wait[i]: index of the copy that
    brings expert i, -1 if it is there. link_left [m]: remaining time of each queued copy in link order, reduced in
    place (0 = done); link_after[j]: accelerator task that reads the slot that copy j overwrites, -1 if none;
    link_from [m]: earliest start. ``*_start`` and ``*_end`` are filled for what starts and ends; ``link_start`` of a
    copy already under way is kept. cpu_rate, link_rate: share of the rate kept while both run.
    """
    n_cpu, n_accel, n_link = cpu_us.size, accel_us.size, link_left.size
    cpu_at, accel_at, link_at = 0, 0, 0
    while link_at < n_link and link_left[link_at] <= 0.0:
        link_at += 1
    cpu_left = cpu_us[0] if n_cpu else 0.0
    accel_left = accel_us[0] if n_accel else 0.0
    time = now_us
    while cpu_at < n_cpu or accel_at < n_accel:
        cpu_can = cpu_at < n_cpu and cpu_from[cpu_at] <= time
        accel_can = accel_at < n_accel and accel_ready_us <= time
        if accel_can and accel_wait[accel_at] >= 0:
            accel_can = link_left[accel_wait[accel_at]] <= 0.0
        link_can = link_at < n_link and link_from[link_at] <= time
        if link_can and link_after[link_at] >= 0:
            link_can = link_after[link_at] < accel_at
        both = cpu_can and link_can
        cpu_speed = cpu_rate if both else 1.0
        link_speed = link_rate if both else 1.0
        step = NEVER_US
        if cpu_can:
            if cpu_start[cpu_at] < 0.0:
                cpu_start[cpu_at] = time
            step = min(step, cpu_left / cpu_speed)
        elif cpu_at < n_cpu and cpu_from[cpu_at] > time:
            step = min(step, cpu_from[cpu_at] - time)
        if accel_can:
            if accel_start[accel_at] < 0.0:
                accel_start[accel_at] = time
            step = min(step, accel_left)
        elif accel_at < n_accel and accel_ready_us > time:
            step = min(step, accel_ready_us - time)
        if link_can:
            if link_start[link_at] < 0.0:
                link_start[link_at] = time
            step = min(step, link_left[link_at] / link_speed)
        elif link_at < n_link and link_from[link_at] > time:
            step = min(step, link_from[link_at] - time)
        if step >= NEVER_US:
            return -1.0
        time += step
        if cpu_can:
            cpu_left -= step * cpu_speed
            if cpu_left <= DONE_US:
                cpu_end[cpu_at] = time
                cpu_at += 1
                cpu_left = cpu_us[cpu_at] if cpu_at < n_cpu else 0.0
        if accel_can:
            accel_left -= step
            if accel_left <= DONE_US:
                accel_end[accel_at] = time
                accel_at += 1
                accel_left = accel_us[accel_at] if accel_at < n_accel else 0.0
        if link_can:
            link_left[link_at] -= step * link_speed
            if link_left[link_at] <= DONE_US:
                link_left[link_at] = 0.0
                link_end[link_at] = time
                link_at += 1
    return time


@compiled
def run_link(
    start_us: float, stop_us: float, link_left: Floats, link_from: Floats, link_start: Floats, link_end: Floats
) -> None:
    """Let the link work alone from ``start_us`` to ``stop_us`` (dense work runs meanwhile); arrays as in run_lanes."""
    time = start_us
    for index in range(link_left.size):
        if link_left[index] <= 0.0:
            continue
        time = max(time, link_from[index])
        if time >= stop_us:
            return
        if link_start[index] < 0.0:
            link_start[index] = time
        if time + link_left[index] <= stop_us + DONE_US:
            time += link_left[index]
            link_left[index] = 0.0
            link_end[index] = time
        else:
            link_left[index] -= stop_us - time
            return
