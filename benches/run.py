#!/usr/bin/env python3
"""The matrix of issue 4, side by side, in one command:

    apt-get install -y fio glusterfs-server glusterfs-client     # once; GlusterFS does not have to run
    ../shared/peers/get-tools.sh                                 # once, about 4 minutes (mended QEMU, pass-through FUSE)
    benches/run.py --write-docs                                  # the full run: about 70 minutes, on a quiet machine
    benches/run.py --runtime 4 --size 1024 --quiet-wait 0 --write-docs        # about 30 minutes
    benches/run.py --quick                                       # everything once, small: about 6 minutes, proves little
    benches/run.py --render --write-docs                         # the tables again from docs/bench/matrix.json

Targets (--targets): plain, a file on the disk that all the others are on; fuse-hp, libfuse's passthrough_hp over it; 0,
1, 2, a cluster of `vmfs up` with so many replicas (acks = majority, TLS, chain); qsd-mirror, qsd-mirror-tls,
qsd-quorum, qsd-quorum-tls, qemu-storage-daemon behind its FUSE export; gluster2, gluster3, GlusterFS with the option
group `virt`. More on demand: qsd-fuse, qsd-fuse-pc, gluster2-tls, gluster3-tls.

All targets are up at the same time, on loopback (GlusterFS in a network namespace) and on one disk: all hosts of a
target share this machine's cores, so the replicas' work is part of the price. They take turns for each workload, in an
order that rotates with each repetition. Each image is filled once with random data ("fill": a fresh file; the first
write of every block), so every workload overwrites or reads what is there. The same fio parameters for all: libaio,
O_DIRECT, --time_based. Before each measurement the page cache is dropped, and (not with --quick) the machine has to
be quiet; a measurement during which other processes used more than a quarter of a core is marked noisy and repeated, up
to --tries times. After each one ours waits until all replicas have everything; that CPU is accounted too.

Needs root, /dev/fuse, fio, and free disk space of about 68 GiB (43 GiB with --size 1024). Builds the release binary unless VMFS_BIN names
one. Everything it makes is in one scratch directory; at the end, also after a failure or Ctrl-C, it takes down what
it brought up. A second Ctrl-C does not interrupt that.
"""
import argparse
import json
import os
import shutil
import sys
import time

from benchlib import docs, report
from benchlib.host import (ROOT, Account, Failure, drop_caches, fio, latency, machine, say, scratch, wait_quiet)
from benchlib.plot import number
from benchlib.setups import (COPIES, DEFAULT_TARGETS, TITLES, Peers, bring_up, make, vmfs_binary, without_namespace)

# name -> (what is reported, images written at once, fio's options)
WORKLOADS = {
    "seq-write-1m": ("MiB/s", 1, ["--rw=write", "--bs=1M", "--iodepth=8"]),
    "seq-read-1m": ("MiB/s", 1, ["--rw=read", "--bs=1M", "--iodepth=8"]),
    "rand-write-4k-qd1": ("IOPS", 1, ["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    "rand-write-4k-qd32": ("IOPS", 1, ["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    "rand-read-4k-qd1": ("IOPS", 1, ["--rw=randread", "--bs=4k", "--iodepth=1"]),
    "rand-read-4k-qd32": ("IOPS", 1, ["--rw=randread", "--bs=4k", "--iodepth=32"]),
    "mix-70-30-8k-qd16": ("IOPS", 1, ["--rw=randrw", "--rwmixread=70", "--bs=8k", "--iodepth=16"]),
    "write-4k-fdatasync": ("IOPS", 1, ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fdatasync=1"]),
    "8-images-fdatasync": ("IOPS", 8, ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fdatasync=1"]),
}
UNITS = {name: unit for name, (unit, _, _) in WORKLOADS.items()} | {"fill": "MiB/s"}
FILL = ["--rw=write", "--bs=1M", "--iodepth=8", "--refill_buffers", "--end_fsync=1"]


def paths_of(target, workload, size_mib):
    return [target.image] if WORKLOADS[workload][1] == 1 else target.images(WORKLOADS[workload][1], size_mib)


def size_of(args, workload):
    """MiB of each image: the eight are together a quarter of the one."""
    count = WORKLOADS[workload][1]
    return args.size if count == 1 else args.size // 4 // count


def figures(job, account, unit, settle_s):
    """One row from fio's report and the account of the time around it."""
    read, write = job["read"], job["write"]
    moved = read["io_bytes"] + write["io_bytes"]
    seconds = max(read["runtime"], write["runtime"]) / 1000
    mib_s, iops = (read["bw_bytes"] + write["bw_bytes"]) / 2**20, read["iops"] + write["iops"]
    value = mib_s if unit == "MiB/s" else iops
    return {
        "value": value, "unit": unit, "mib_s": mib_s, "iops": iops, "gib": moved / 2**30, "seconds": seconds,
        "settle_s": settle_s, "settled_value": value * seconds / (seconds + settle_s),
        "read": latency(read), "write": latency(write), "sync": latency(job.get("sync", {}), "lat_ns"),
        "cpu_s_per_gib": account["cpu_s"] / max(moved / 2**30, 1e-9), **account,
    }


def measure(args, work, target, name, paths, options, quiet=True):
    if quiet:
        wait_quiet(args.quiet_wait)
    drop_caches()
    account = Account(target.daemons())
    job = fio(work, paths, options)
    start = time.monotonic()
    target.settle(paths)
    return figures(job, account.end(), UNITS[name], time.monotonic() - start)


def measured(args, work, name, target, target_name, rep, keep):
    """Measures and keeps a row; again while it is noisy. A failure is a row too: the others go on."""
    paths = paths_of(target, name, size_of(args, name))
    options = [*WORKLOADS[name][2], f"--size={size_of(args, name)}M", "--time_based", f"--runtime={args.runtime}"]
    for attempt in range(args.tries):
        row = {"target": target_name, "workload": name, "rep": rep, "time": time.time()}
        try:
            row.update(measure(args, work, target, name, paths, options))
            shown = f"{number(row['value'])} {row['unit']}{', noisy' if row['noisy'] else ''}"
        except (Failure, OSError) as e:
            row.update(error=str(e), noisy=False)
            shown = f"FAILED: {e}"
        keep(row)
        say(f"{rep}/{args.reps} {name}, {TITLES[target_name]}: {shown}")
        if not row["noisy"]:
            return


def fill(args, work, target, target_name, keep):
    """The whole image, and each of the eight, once. Everything after this overwrites."""
    row = {"target": target_name, "workload": "fill", "rep": 0, "time": time.time()}
    options = [*FILL, f"--size={args.size}M"]
    keep({**row, **measure(args, work, target, "fill", [target.image], options, quiet=False)})
    for name in args.workloads:
        paths = paths_of(target, name, size_of(args, name))
        if len(paths) > 1:
            fio(work, paths, [*FILL, f"--size={size_of(args, name)}M"])
            target.settle(paths)


def select(args, peers):
    """The targets that can be measured; why the others cannot is said, and an error if they were asked for by name."""
    missing = {}
    for name in args.targets:
        why = None if name in ("plain", "0", "1", "2", "3", "4") else peers.why_not(name)
        if why:
            missing[name] = why
            say(f"MISSING: {TITLES[name]}: {why}")
    if missing and args.explicit:
        raise Failure("targets are missing: " + "; ".join(f"{TITLES[n]}: {why}" for n, why in missing.items()))
    return [t for t in args.targets if t not in missing], missing


def run_all(args, rows, missing):
    def keep(row):
        rows.append(row)
        save(args, rows, missing)

    with scratch(args.dir, last=without_namespace()) as (work, undo):
        peers = Peers(args.peers, args.tools, work, args.size)
        names, absent = select(args, peers)
        missing.update(absent)
        # Each copy of the big image and the eight. Beside them the log of ours keeps what random writes have superseded
        # until its segment holds nothing else, at the latest until the sequential write of the next repetition.
        ours = sum(int(n) + 1 for n in names if n.isdigit())
        copies = ours + sum(COPIES.get(n, 1) for n in names if not n.isdigit())
        need = (args.size * 5 // 4 * copies + max(1024, 300 * args.runtime) * ours) << 20
        if shutil.disk_usage(work).free < need:
            raise Failure(f"{work} has {shutil.disk_usage(work).free >> 30} GiB free; this run needs about {need >> 30} "
                          "(--size, --targets, --dir)")
        vmfs = vmfs_binary() if any(n.isdigit() for n in names) else None
        targets = {}
        for name in names:
            target = make(name, vmfs, peers, work)
            try:
                took_s = bring_up(target, undo)
                fill(args, work, target, name, keep)
            except (Failure, OSError) as e:
                missing[name] = f"did not come up: {e}"
                say(f"FAILED: {TITLES[name]} {missing[name]}")
                continue
            targets[name] = target
            say(f"{TITLES[name]}: up in {took_s:.1f} s, filled at {number(rows[-1]['value'])} MiB/s")
        for rep in range(1, args.reps + 1):
            turn = (rep - 1) % max(len(targets), 1)
            order = list(targets)[turn:] + list(targets)[:turn]
            for workload in args.workloads:
                for name in order:
                    measured(args, work, workload, targets[name], name, rep, keep)


def about(args):
    return {"machine": machine(), "size_mib": args.size, "runtime_s": args.runtime, "reps": args.reps,
            "command": " ".join(["benches/run.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d")}


def save(args, rows, missing):
    """After every row: an interrupted run has not been for nothing."""
    order = {t: i for i, t in enumerate(args.targets)}
    kept = sorted(rows, key=lambda r: order.get(r["target"], 99))
    with open(args.json + ".new", "w") as f:
        head = json.dumps({"about": args.about, "missing": missing})
        f.write(head[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(r) for r in kept) + "\n]}\n")
    os.replace(args.json + ".new", args.json)


def present(args):
    data = json.load(open(args.json))
    res, info = report.Results(data["rows"], data["missing"]), data["about"]
    heading = (f"    {info['command']}\n\n{info['machine']}; {info['date']}; {info['size_mib']} MiB images, {info['runtime_s']} s "
               f"a measurement, median of {info['reps']}.")
    plot_path = os.path.join(docs.folder(), "matrix.svg") if args.write_docs else os.path.splitext(args.json)[0] + ".svg"
    report.draw(res, UNITS, plot_path)
    text = report.markdown(res, UNITS, heading, "bench/matrix.svg" if args.write_docs else plot_path)
    print(text)
    if args.write_docs:
        docs.put("matrix", text)
        say(f"written: {docs.PAGE}, {plot_path}")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="256 MiB images, 2 s, once, without waiting for quiet")
    p.add_argument("--runtime", type=int, default=None, help="seconds a measurement [10]")
    p.add_argument("--reps", type=int, default=None, help="repetitions [3]")
    p.add_argument("--size", type=int, default=None, help="MiB of an image [2048]")
    p.add_argument("--tries", type=int, default=None, help="measurements while they are noisy [3]")
    p.add_argument("--quiet-wait", type=int, default=None, metavar="S", help="longest wait for a quiet machine [60]")
    p.add_argument("--dir", default=None, help="where the scratch directory goes [TMPDIR]; it decides which disk is measured")
    p.add_argument("--peers", default=os.path.join(os.path.dirname(ROOT), "shared", "peers"), help="directory of peers.sh")
    p.add_argument("--tools", default=os.path.join(os.environ.get("TMPDIR", "/tmp"), "peers", "tools"),
                   help="what get-tools.sh has made [TMPDIR/peers/tools]")
    p.add_argument("--json", default=None, help="where the raw results go [docs/bench/matrix.json with --write-docs]")
    p.add_argument("--workloads", default=",".join(WORKLOADS))
    p.add_argument("--targets", default=None, help="[all but those on demand]")
    p.add_argument("--write-docs", action="store_true", help="puts tables and plot into docs/performance.md")
    p.add_argument("--render", action="store_true", help="measures nothing: presents the results in --json")
    args = p.parse_args()
    args.explicit = args.targets is not None
    args.targets = args.targets.split(",") if args.explicit else list(DEFAULT_TARGETS)
    args.workloads = args.workloads.split(",")
    args.peers = os.path.abspath(args.peers)
    for name, known in [(w, WORKLOADS) for w in args.workloads] + [(t, TITLES) for t in args.targets]:
        if name not in known:
            p.error(f"{name} is none of {', '.join(known)}")
    usual = {"runtime": 2, "reps": 1, "size": 256, "tries": 1, "quiet_wait": 0} if args.quick else \
        {"runtime": 10, "reps": 3, "size": 2048, "tries": 3, "quiet_wait": 60}
    for key, value in usual.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    in_docs = os.path.join(docs.FOLDER, "matrix.json")
    args.json = args.json or (in_docs if args.write_docs or args.render else os.path.abspath("matrix.json"))
    if os.geteuid() != 0 and not args.render:
        p.error("needs root (mounts, namespaces, drop_caches)")
    return args


def main():
    args = arguments()
    if args.render:
        return present(args)
    if args.write_docs:
        docs.folder()
    args.about = about(args)
    rows, missing = [], {}
    try:
        run_all(args, rows, missing)
    except Failure as e:
        sys.exit(f"run.py: {e}")
    present(args)
    if any("error" in r for r in rows) or any("did not come up" in why for why in missing.values()):
        sys.exit("run.py: some measurements failed (see above)")


if __name__ == "__main__":
    main()
