#!/usr/bin/env python3
"""How cost grows, as plots:

    benches/scale.py --write-docs                  # all four: about 22 minutes, on a quiet machine
    benches/scale.py --reps 1 --write-docs         # all points, once: about 8 minutes
    benches/scale.py --quick                       # few points, once: about 3 minutes
    benches/scale.py --only size,replicas          # some of: size, fragmentation, images, replicas
    benches/scale.py --render --write-docs         # the plots again from docs/bench/scale.json

size            One replica. Sparse images of 1 GiB to 1 TiB, each with 32,768 random 4 KiB writes all over it first, so
                that the map is as large as the image lets it become. Then: sequential write (1 GiB from the middle),
                random 4 KiB writes all over, random reads of what was written, 4 KiB + fdatasync all over.
fragmentation   One replica. Images of --size MiB, filled sequentially, then overwritten in random order by 4 KiB
                writes: nothing, a quarter, half, all of it, each block once. Sequential read after that, with a
                cold page cache; random 4 KiB reads, too; sequential read once more when the store's background work has
                put the blocks in order. Target: at least 0.5x of fresh when all is overwritten.
images          One replica. 1 to 200 images, each written by one fio job with 4 KiB + fdatasync, all at once:
                flushes a second together, latency of one, memory of both daemons.
replicas        0 to 4 replicas: sequential write until all have it, random write, latency of a flush, CPU per GiB.

Points take turns within each repetition. Link delay has a program of its own (delay.py). Needs root, /dev/fuse, fio. Builds the release binary unless VMFS_BIN names one.
All in one scratch directory, gone at the end, also after a failure or Ctrl-C.
"""
import argparse
import json
import os
import statistics
import sys
import time

from benchlib import docs, plot
from benchlib.host import Account, Failure, drop_caches, fio, latency, machine, memory_mib, say, scratch
from benchlib.plot import number
from benchlib.report import table, verdict
from benchlib.setups import Cluster, bring_up, vmfs_binary

FSYNC = ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fdatasync=1"]
SEQ_WRITE, SEQ_READ = ["--rw=write", "--bs=1M", "--iodepth=8"], ["--rw=read", "--bs=1M", "--iodepth=8"]
RAND_WRITE = ["--rw=randwrite", "--bs=4k", "--iodepth=32"]
RAND_READ = ["--rw=randread", "--bs=4k", "--iodepth=32"]


class Bench:
    """`row` keeps one figure set: part, series name, x, figures."""

    def __init__(self, args, work, undo, vmfs, rows):
        self.args, self.work, self.undo, self.vmfs, self.rows = args, work, undo, vmfs, rows

    def cluster(self, host_count, name):
        cluster = Cluster(self.vmfs, self.work, host_count, name)
        bring_up(cluster, self.undo)
        return cluster

    def timed(self):
        return ["--time_based", f"--runtime={self.args.runtime}"]

    def row(self, part, x, rep, **figures):
        self.rows.append({"part": part, "x": x, "rep": rep, **figures})
        shown = ", ".join(f"{k} {number(v)}" for k, v in figures.items())
        say(f"{part} {x} ({rep}/{self.args.reps}): {shown}")

    def run(self, cluster, paths, options, cold=True):
        """fio's report and the account, until all replicas have everything."""
        if cold:
            drop_caches()
        account = Account(cluster.daemons())
        began = time.monotonic()
        job = fio(self.work, paths, options)
        cluster.settle(paths)
        end = account.end()
        end["seconds"] = time.monotonic() - began
        return job, end


def mib_s(job, side):
    return job[side]["bw_bytes"] / 2**20


def settled_mib_s(job, end):
    return job["write"]["io_bytes"] / 2**20 / end["seconds"]


def sync_us(job, p):
    return (latency(job["sync"], "lat_ns") or {}).get(p)


def size(bench):
    args = bench.args
    sizes = [1, 64, 1024] if args.quick else [1, 4, 16, 64, 256, 1024]
    writes = 4096 if args.quick else 32768
    part_mib = 64 if args.quick else 512
    cluster = bench.cluster(2, "size")
    for gib in sizes:
        path = cluster.path(f"size-{gib}.img")
        with open(path, "wb") as f:
            f.truncate(gib << 30)
        fio(bench.work, [path], [*RAND_WRITE, f"--size={gib}G", f"--number_ios={writes}"])
        cluster.settle([path])
    for rep in range(1, args.reps + 1):
        for gib in sizes:
            path, whole = cluster.path(f"size-{gib}.img"), f"--size={gib}G"
            middle = [f"--offset={gib * 512}M", f"--size={part_mib}M"]
            seq, seq_end = bench.run(cluster, [path], [*SEQ_WRITE, *middle])
            write, _ = bench.run(cluster, [path], [*RAND_WRITE, whole, *bench.timed()])
            read, _ = bench.run(cluster, [path], [*RAND_READ, *middle, *bench.timed()])
            flush, end = bench.run(cluster, [path], [*FSYNC, whole, *bench.timed()])
            bench.row("size", gib, rep, seq_write_mib_s=settled_mib_s(seq, seq_end), rand_write_iops=write["write"]["iops"],
                      rand_read_iops=read["read"]["iops"], sync_p50_us=sync_us(flush, "p50"), sync_p99_us=sync_us(flush, "p99"),
                      memory_mib=max(p["peak_mib"] for p in end["procs"]))
    cluster.down()


def await_rest(cluster, path, calm_s=15, limit_s=300):
    """Until the store has moved nothing of the image for so long: it begins ten seconds after the last writes."""
    moved, since, end = None, time.monotonic(), time.monotonic() + limit_s
    while time.monotonic() < min(since + calm_s, end):
        time.sleep(1)
        now = json.loads(cluster.cli("a", "info", os.path.basename(path), "--json").stdout)["compacted_bytes"]
        if now != moved:
            moved, since = now, time.monotonic()


def fragmentation(bench):
    args = bench.args
    mib = 256 if args.quick else args.size
    cluster = bench.cluster(2, "fragmentation")
    for rep in range(1, args.reps + 1):
        for percent in (0, 25, 50, 100):
            path = cluster.path(f"frag-{rep}-{percent}.img")
            fio(bench.work, [path], [*SEQ_WRITE, "--refill_buffers", f"--size={mib}M", "--end_fsync=1"])
            if percent:
                fio(bench.work, [path], [*RAND_WRITE, "--refill_buffers", f"--size={mib}M",
                                         f"--io_size={mib * percent // 100}M", "--end_fsync=1"], each_once=True)
            cluster.settle([path])
            seq, _ = bench.run(cluster, [path], [*SEQ_READ, f"--size={mib}M"])
            rand, _ = bench.run(cluster, [path], [*RAND_READ, f"--size={mib}M", *bench.timed()])
            await_rest(cluster, path)
            rested, _ = bench.run(cluster, [path], [*SEQ_READ, f"--size={mib}M"])
            bench.row("fragmentation", percent, rep, seq_read_mib_s=mib_s(seq, "read"), rand_read_iops=rand["read"]["iops"],
                      rested_read_mib_s=mib_s(rested, "read"))
            os.unlink(path)
    cluster.down()


def images(bench):
    args = bench.args
    counts = [1, 8, 32] if args.quick else [1, 2, 4, 8, 16, 32, 64, 100, 200]
    cluster = bench.cluster(2, "images")
    paths = [cluster.path(f"many-{i}.img") for i in range(max(counts))]
    for at in range(0, len(paths), 16):
        fio(bench.work, paths[at:at + 16], [*SEQ_WRITE, "--size=16M", "--end_fsync=1"])
    cluster.settle(paths)
    for rep in range(1, args.reps + 1):
        for count in counts:
            job, end = bench.run(cluster, paths[:count], [*FSYNC, "--size=16M", "--thread", *bench.timed()])
            bench.row("images", count, rep, iops=job["write"]["iops"], sync_p50_us=sync_us(job, "p50"),
                      sync_p99_us=sync_us(job, "p99"), **{f"{p['role']}_mib": p["peak_mib"] for p in end["procs"]})
    idle = {role: memory_mib(pid, "VmRSS") for pid, role in cluster.daemons().items()}
    say(f"resident with {len(paths)} images that are idle again: {idle}")
    cluster.down()


def replicas(bench):
    args = bench.args
    mib = 256 if args.quick else 512  # 15 copies of it
    clusters = {n: bench.cluster(n + 1, f"replicas-{n}") for n in ((0, 1, 4) if args.quick else range(5))}
    for cluster in clusters.values():
        fio(bench.work, [cluster.image], [*SEQ_WRITE, "--refill_buffers", f"--size={mib}M", "--end_fsync=1"])
        cluster.settle()
    for rep in range(1, args.reps + 1):
        for n, cluster in clusters.items():
            whole = f"--size={mib}M"
            seq, end = bench.run(cluster, [cluster.image], [*SEQ_WRITE, whole, *bench.timed()])
            write, _ = bench.run(cluster, [cluster.image], [*RAND_WRITE, whole, *bench.timed()])
            flush, _ = bench.run(cluster, [cluster.image], [*FSYNC, whole, *bench.timed()])
            gib = seq["write"]["io_bytes"] / 2**30
            bench.row("replicas", n, rep, seq_write_mib_s=mib_s(seq, "write"), settled_mib_s=settled_mib_s(seq, end),
                      rand_write_iops=write["write"]["iops"], flush_iops=flush["write"]["iops"],
                      sync_p50_us=sync_us(flush, "p50"), sync_p99_us=sync_us(flush, "p99"), cpu_s_per_gib=end["cpu_s"] / gib)
    for cluster in clusters.values():
        cluster.down()


# ---- what comes out ------------------------------------------------------------------------------------------

SIZE_TICKS = {1: "1 GiB", 4: "4", 16: "16", 64: "64", 256: "256", 1024: "1 TiB"}
# part -> (function, title, x label, logarithmic, ticks, panels: (heading, [(series name, key)]))
PARTS = {
    "size": (size, "Cost against image size (1 replica, sparse)", "image size", True, SIZE_TICKS, [
        ("sequential write until in sync, MiB/s", [("1 MiB, depth 8", "seq_write_mib_s")]),
        ("random 4 KiB, depth 32, IOPS", [("write", "rand_write_iops"), ("read", "rand_read_iops")]),
        ("flush (4 KiB + fdatasync), µs", [("median", "sync_p50_us"), ("99th percentile", "sync_p99_us")]),
        ("peak memory of the larger daemon, MiB", [("peak", "memory_mib")])]),
    "fragmentation": (fragmentation, "Cost of fragmentation (1 replica, cold cache)", "% overwritten in random order", False,
                      None, [
        ("sequential read 1 MiB, depth 8, MiB/s", [("at once", "seq_read_mib_s"), ("after a rest", "rested_read_mib_s")]),
        ("random read 4 KiB, depth 32, IOPS", [("read", "rand_read_iops")])]),
    "images": (images, "Images written and flushed at once (1 replica)", "images", True, None, [
        ("4 KiB + fdatasync, all together, IOPS", [("all images", "iops")]),
        ("flush, µs", [("median", "sync_p50_us"), ("99th percentile", "sync_p99_us")]),
        ("peak memory, MiB", [("owner", "owner_mib"), ("replica", "replica_mib")])]),
    "replicas": (replicas, "Cost of replicas (all hosts on one machine)", "replicas", False, None, [
        ("sequential write, MiB/s", [("as fio sees it", "seq_write_mib_s"), ("until in sync", "settled_mib_s")]),
        ("4 KiB, IOPS", [("random write, depth 32", "rand_write_iops"), ("with fdatasync each", "flush_iops")]),
        ("flush, µs", [("median", "sync_p50_us"), ("99th percentile", "sync_p99_us")]),
        ("CPU of all daemons, s per GiB", [("sequential write", "cpu_s_per_gib")])]),
}


def points(rows, key):
    """[(x, median, least, most)] over the repetitions."""
    out = []
    for x in sorted({r["x"] for r in rows}):
        values = [r[key] for r in rows if r["x"] == x and r.get(key) is not None]
        if values:
            out.append((x, statistics.median(values), min(values), max(values)))
    return out


def part_table(name, rows):
    keys = [key for _, series in PARTS[name][5] for _, key in series]
    by_key = {key: {x: median for x, median, _, _ in points(rows, key)} for key in keys}
    xs = sorted({r["x"] for r in rows})
    ticks = PARTS[name][4] or {}
    return table([PARTS[name][2], *(k.replace("_", " ") for k in keys)],
                 [[ticks.get(x, f"{x:g}"), *(number(by_key[k].get(x)) for k in keys)] for x in xs])


def present(args):
    data = json.load(open(args.json))
    info = data["about"]
    text = [f"    {info['command']}\n\n{info['machine']}; {info['date']}. Medians of {info['reps']}, {info['runtime_s']} s a "
            "measurement; thin lines in the plots are the range."]
    where = docs.folder() if args.write_docs else os.path.dirname(args.json)
    for name, (_, title, x_label, x_log, ticks, panels) in PARTS.items():
        rows = [r for r in data["rows"] if r["part"] == name]
        text += [f"Failed: {name}: {data['failed'][name]}"] if name in data["failed"] else []
        if not rows:
            continue
        path = os.path.join(where, f"scale-{name}.svg")
        plot.lines(path, title, [(heading, x_label, x_log, [(label, points(rows, key)) for label, key in series], ticks)
                                 for heading, series in panels])
        text += [f"### {title}", f"![{title}](bench/scale-{name}.svg)", part_table(name, rows)]
        if name == "fragmentation":
            medians = {x: m for x, m, _, _ in points(rows, "seq_read_mib_s")}
            if 0 in medians and 100 in medians:
                text.append(f"Sequential read after overwriting everything in random order: {medians[100] / medians[0]:.2f}x of "
                            f"fresh; at least 0.5x: {verdict(medians[100], 0.5 * medians[0])}.")
            rested = {x: m for x, m, _, _ in points(rows, "rested_read_mib_s")}
            if 0 in rested and 100 in rested:
                text.append(f"After a rest: {rested[100] / rested[0]:.2f}x: {verdict(rested[100], 0.5 * rested[0])}.")
    text = "\n\n".join(text) + "\n"
    print(text)
    if args.write_docs:
        docs.put("scale", text)
        say(f"written: {docs.PAGE}")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--only", default=",".join(PARTS))
    p.add_argument("--reps", type=int, default=None, help="[3]")
    p.add_argument("--runtime", type=int, default=None, help="seconds a measurement [5]")
    p.add_argument("--size", type=int, default=1024, help="MiB of the image of `fragmentation` [1024]")
    p.add_argument("--dir", default=None, help="where the scratch directory goes [TMPDIR]")
    p.add_argument("--json", default=None, help="raw results [docs/bench/scale.json with --write-docs]")
    p.add_argument("--write-docs", action="store_true")
    p.add_argument("--render", action="store_true")
    args = p.parse_args()
    args.only = args.only.split(",")
    for name in args.only:
        if name not in PARTS:
            p.error(f"{name} is none of {', '.join(PARTS)}")
    args.reps, args.runtime = args.reps or (1 if args.quick else 3), args.runtime or (2 if args.quick else 5)
    in_docs = os.path.join(docs.FOLDER, "scale.json")
    args.json = args.json or (in_docs if args.write_docs or args.render else os.path.abspath("scale.json"))
    if os.geteuid() != 0 and not args.render:
        p.error("needs root")
    return args


def main():
    args = arguments()
    if args.render:
        return present(args)
    if args.write_docs:
        docs.folder()
    data = {"about": {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "reps": args.reps, "runtime_s": args.runtime,
                      "command": " ".join(["benches/scale.py", *sys.argv[1:]])}, "failed": {}, "rows": []}
    with scratch(args.dir) as (work, undo):
        vmfs = vmfs_binary()
        for name in args.only:
            try:
                PARTS[name][0](Bench(args, work, undo, vmfs, data["rows"]))
            except (Failure, OSError) as e:
                data["failed"][name] = str(e)
                say(f"FAILED: {name}: {e}")
            with open(args.json, "w") as f:
                f.write(json.dumps({**data, "rows": []})[:-3] + "[\n" + ",\n".join(map(json.dumps, data["rows"])) + "\n]}\n")
    present(args)
    if data["failed"]:
        sys.exit("scale.py: some failed (see above)")


if __name__ == "__main__":
    main()
