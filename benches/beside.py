#!/usr/bin/env python3
"""Two versions of ours side by side, in one run: what a change is worth.

    cargo build --profile quick --bin vmfs && cp target/quick/vmfs /tmp/vmfs-before
    ... the change ...
    cargo build --profile quick --bin vmfs
    benches/beside.py /tmp/vmfs-before target/quick/vmfs --workloads write-4k-fdatasync,rand-read-4k-qd1

Both clusters (an owner and --replicas replicas each) and a plain file are up at the same time, on loopback and on one
disk. In each round every workload is run on each of the three, in an order that rotates; what is printed are medians
over the rounds and ratios to the first version. The workloads are those of run.py, with its parameters. On a machine
that is busy otherwise, `chrt -f 1 benches/beside.py ...` puts everything it starts before the rest.

Needs root, /dev/fuse and fio. Takes about (2 + runtime) * 3 seconds per workload and round. Everything it makes is in
one scratch directory, and is taken down at the end.
"""
import argparse
import os
import statistics
import sys

from benchlib.host import Failure, fio, say, scratch
from benchlib.plot import number
from benchlib.setups import Cluster, Plain, bring_up
from run import FILL, WORKLOADS, measure, paths_of, size_of


def fill(args, work, target):
    for count in {WORKLOADS[name][1] for name in args.workloads}:
        paths = [target.image] if count == 1 else target.images(count, 0)
        size = args.size if count == 1 else args.size // 4 // count
        fio(work, paths, [*FILL, f"--size={size}M"])
        target.settle(paths)


def run_all(args, work, undo):
    """(target, workload) -> rows."""
    targets = {"plain": Plain(work)}
    for name, binary in (("before", args.before), ("after", args.after)):
        targets[name] = Cluster(os.path.abspath(binary), work, args.replicas + 1, name)
    for target in targets.values():
        bring_up(target, undo)
        fill(args, work, target)
    rows = {(t, w): [] for t in targets for w in args.workloads}
    for turn in range(args.rounds):
        order = list(targets)[turn % 3:] + list(targets)[:turn % 3]
        for workload in args.workloads:
            options = [*WORKLOADS[workload][2], f"--size={size_of(args, workload)}M", "--time_based",
                       f"--runtime={args.runtime}"]
            for name in order:
                paths = paths_of(targets[name], workload, size_of(args, workload))
                row = measure(args, work, targets[name], workload, paths, options, quiet=False)
                rows[name, workload].append(row)
        say(f"round {turn + 1} of {args.rounds}")
    return rows


def median(rows, *path):
    def at(row):
        for key in path:
            row = (row or {}).get(key)
        return row
    values = [v for v in map(at, rows) if v is not None]
    return statistics.median(values) if values else None


def cpu_us(rows, role):
    """CPU time of the daemons of a role for each operation, in microseconds."""
    per_op = [sum(p["cpu_s"] for p in r["procs"] if p["role"] == role) / max(r["iops"] * r["seconds"], 1) for r in rows]
    return statistics.median(per_op) * 1e6


def present(args, rows):
    print("| workload | plain file | before | after | after / before | p50 / p99, µs, before | after "
          "| CPU per op, owner + replicas, µs, before | after |")
    print("| --- |" + " ---: |" * 8)
    for w in args.workloads:
        value = {t: median(rows[t, w], "value") for t in ("plain", "before", "after")}
        cells = [w, *(number(v) for v in value.values())]
        ratios = sorted(a["value"] / b["value"] for a, b in zip(rows["after", w], rows["before", w]))
        cells.append(f"**{statistics.median(ratios):.2f}x** ({ratios[0]:.2f}-{ratios[-1]:.2f})")
        for t in ("before", "after"):
            sides = [(s, median(rows[t, w], s, "p50"), median(rows[t, w], s, "p99")) for s in ("read", "write", "sync")]
            cells.append(", ".join(f"{s[0]} {p50:.0f} / {p99:.0f}" for s, p50, p99 in sides if p50 is not None))
        cells += [f"{cpu_us(rows[t, w], 'owner'):.0f} + {cpu_us(rows[t, w], 'replica'):.0f}" for t in ("before", "after")]
        print("| " + " | ".join(cells) + " |")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("before", help="a vmfs binary")
    p.add_argument("after", help="another")
    p.add_argument("--workloads", default=",".join(WORKLOADS))
    p.add_argument("--replicas", type=int, default=1)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--runtime", type=int, default=2, help="seconds a measurement [2]")
    p.add_argument("--size", type=int, default=256, help="MiB of an image [256]")
    p.add_argument("--dir", default=None, help="where the scratch directory goes [TMPDIR]; it decides which disk is measured")
    args = p.parse_args()
    args.workloads = args.workloads.split(",")
    unknown = [w for w in args.workloads if w not in WORKLOADS]
    if unknown:
        p.error(f"no such workload: {', '.join(unknown)}")
    if os.geteuid() != 0:
        p.error("needs root (mounts, drop_caches)")
    return args


def main():
    args = arguments()
    try:
        with scratch(args.dir) as (work, undo):
            rows = run_all(args, work, undo)
    except Failure as e:
        sys.exit(f"beside.py: {e}")
    present(args, rows)


if __name__ == "__main__":
    main()
