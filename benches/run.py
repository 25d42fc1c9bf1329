#!/usr/bin/env python3
"""The fio matrix of docs/performance.md, in one command:

    benches/run.py [--quick] [--runtime SECONDS] [--reps N] [--size MIB] [--dir DIR] [--json FILE]
                   [--workloads NAME,...] [--targets plain,0,1,2]

Runs every workload on a plain file, and on the mount with no, one and two replicas (clusters made by
`vmfs up` on this machine: all hosts share its cores and its disk, so the replicas' work is part of the
price). The targets take turns within each repetition, so that a slow minute of the machine hits all of
them. Prints Markdown: medians, ratios to the plain file, CPU seconds and peak memory of the daemons, and
the memory of a daemon with 100 idle images. Builds the release binary unless VMFS_BIN names one. Needs
root, /dev/fuse and fio. Everything it makes is in a scratch directory that is gone at its end.
"""
import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TICKS = os.sysconf("SC_CLK_TCK")
# name -> (what is reported, fio's options)
WORKLOADS = {
    "seq-write-1m": ("MiB/s", ["--rw=write", "--bs=1M", "--iodepth=8"]),
    "seq-read-1m": ("MiB/s", ["--rw=read", "--bs=1M", "--iodepth=8"]),
    "rand-write-4k-qd1": ("IOPS", ["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    "rand-write-4k-qd32": ("IOPS", ["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    "rand-read-4k-qd1": ("IOPS", ["--rw=randread", "--bs=4k", "--iodepth=1"]),
    "rand-read-4k-qd32": ("IOPS", ["--rw=randread", "--bs=4k", "--iodepth=32"]),
    "write-4k-fdatasync": ("IOPS", ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fdatasync=1"]),
    "mix-70-30-8k-qd16": ("IOPS", ["--rw=randrw", "--rwmixread=70", "--bs=8k", "--iodepth=16"]),
}
TITLES = {"plain": "plain file", "0": "no replica", "1": "1 replica", "2": "2 replicas"}


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def vmfs_binary():
    if os.environ.get("VMFS_BIN"):
        return os.environ["VMFS_BIN"]
    out = subprocess.run(
        ["cargo", "build", "--release", "--bin", "vmfs", "--message-format=json-render-diagnostics"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout
    for line in out.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == "vmfs" and message.get("executable"):
            return message["executable"]
    raise SystemExit("cargo did not say where vmfs is")


class Plain:
    """A file on the disk that the stores are on."""

    def __init__(self, work):
        self.image = os.path.join(work, "plain.img")

    def pids(self):
        return []

    def down(self):
        pass


class Cluster:
    """`vmfs up` with a number of hosts; the image is on host a's mount."""

    def __init__(self, vmfs, work, host_count, name):
        self.vmfs, self.dir = vmfs, os.path.join(work, name)
        subprocess.run([vmfs, "up", self.dir, "--hosts", str(host_count), "--detach"], check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.hosts = "abcdefgh"[:host_count]
        self.image = os.path.join(self.dir, "a/mnt/bench.img")

    def pids(self):
        return [int(open(os.path.join(self.dir, h, "vmfs.pid")).read()) for h in self.hosts]

    def wait_in_sync(self, image="bench.img"):
        subprocess.run([self.vmfs, "--socket", os.path.join(self.dir, "a/vmfs.sock"), "wait", image,
                        "--in-sync", "--timeout", "600"], check=True, stdout=subprocess.DEVNULL)

    def down(self):
        subprocess.run([self.vmfs, "down", self.dir], check=False, stdout=subprocess.DEVNULL)
        # A daemon that died left its mount; nothing below it may be taken for the scratch directory's.
        for host in self.hosts:
            subprocess.run(["umount", "-l", os.path.join(self.dir, host, "mnt")], check=False,
                           stderr=subprocess.DEVNULL)


def cpu_s(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(pid, key):
    return int(re.search(rf"^{key}:\s+(\d+) kB", open(f"/proc/{pid}/status").read(), re.M)[1]) / 1024


def reset_peak(pid):
    with open(f"/proc/{pid}/clear_refs", "w") as f:
        f.write("5")


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("1")


def fio(work, image, options):
    command = ["fio", "--name=bench", f"--filename={image}", "--ioengine=libaio", "--direct=1", "--randrepeat=0",
               "--norandommap", "--refill_buffers", "--output-format=json", *options]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"fio failed: {' '.join(command)}\n{done.stderr or done.stdout}")
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    if job["error"]:
        raise SystemExit(f"fio reports error {job['error']}: {' '.join(command)}")
    return job


def percentile_us(side, p):
    return side["clat_ns"].get("percentile", {}).get(f"{p:.6f}", 0) / 1000


def measure(args, work, target, name):
    unit, options = WORKLOADS[name]
    drop_caches()
    pids = target.pids()
    for pid in pids:
        reset_peak(pid)
    before = [cpu_s(p) for p in pids]
    job = fio(work, target.image, [*options, f"--size={args.size}M", "--time_based", f"--runtime={args.runtime}"])
    # What the replicas still have to do for these writes belongs to their price.
    if isinstance(target, Cluster):
        target.wait_in_sync()
    read, write = job["read"], job["write"]
    moved = read["io_bytes"] + write["io_bytes"]
    cpu = [cpu_s(p) - b for p, b in zip(pids, before)]
    row = {
        "value": (read["bw_bytes"] + write["bw_bytes"]) / 2**20 if unit == "MiB/s" else read["iops"] + write["iops"],
        "p50_us": percentile_us(write if write["total_ios"] else read, 50),
        "p99_us": percentile_us(write if write["total_ios"] else read, 99),
        "gib": moved / 2**30,
        "cpu_owner_s": cpu[0] if cpu else 0,
        "cpu_replicas_s": sum(cpu[1:]),
        "peak_owner_mib": memory_mib(pids[0], "VmHWM") if pids else 0,
        "peak_replica_mib": max((memory_mib(p, "VmHWM") for p in pids[1:]), default=0),
    }
    if name == "write-4k-fdatasync":
        sync = job["sync"]["lat_ns"]
        row["p50_us"] = sync.get("percentile", {}).get("50.000000", 0) / 1000
        row["p99_us"] = sync.get("percentile", {}).get("99.000000", 0) / 1000
    return row


def idle_images(vmfs, work):
    """Memory of a daemon that owns 100 idle images of 100 GiB, and of one that replicates them."""
    cluster = Cluster(vmfs, work, 3, "idle")
    try:
        for i in range(100):
            with open(os.path.join(cluster.dir, f"a/mnt/idle-{i}.img"), "wb") as f:
                f.truncate(100 << 30)
                for at in range(16):
                    f.seek(at * (6 << 30))
                    f.write(os.urandom(65536))
                f.flush()
                os.fsync(f.fileno())
        for i in range(100):
            cluster.wait_in_sync(f"idle-{i}.img")
        return [memory_mib(p, "VmRSS") for p in cluster.pids()]
    finally:
        cluster.down()


def number(x):
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def machine():
    cpu = re.search(r"^model name\s*: (.*)$", open("/proc/cpuinfo").read(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    version = subprocess.run(["fio", "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    return (f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}, {memory:.0f} GiB, "
            f"Linux {platform.release()}, {version}, commit {commit.stdout.strip()}")


def report(args, rows, idle):
    names = [t for t in ("plain", "0", "1", "2") if t in args.targets]
    median = lambda t, w, key: statistics.median(r[key] for r in rows[t, w])
    print(f"{machine()}; {args.size} MiB images, {args.runtime} s a run, median of {args.reps}.\n")
    print("| workload | unit | " + " | ".join(TITLES[t] for t in names) + " |")
    print("| --- | --- |" + " ---: |" * len(names))
    for w in args.workloads:
        cells = []
        for t in names:
            value = median(t, w, "value")
            base = median("plain", w, "value") if "plain" in names else 0
            cells.append(number(value) + (f" ({value / base:.2f}x)" if base and t != "plain" else ""))
        print(f"| {w} | {WORKLOADS[w][0]} | " + " | ".join(cells) + " |")
    print("\nLatency in µs, median / 99th percentile (of the write, for fdatasync of the sync):\n")
    print("| workload | " + " | ".join(TITLES[t] for t in names) + " |")
    print("| --- |" + " ---: |" * len(names))
    for w in args.workloads:
        cells = [f"{median(t, w, 'p50_us'):.0f} / {median(t, w, 'p99_us'):.0f}" for t in names]
        print(f"| {w} | " + " | ".join(cells) + " |")
    mounts = [t for t in names if t != "plain"]
    if not mounts:
        return
    print("\nCPU seconds per GiB moved, owner + all replicas; peak memory in MiB, owner / largest replica:\n")
    print("| workload | " + " | ".join(f"{TITLES[t]}: CPU | memory" for t in mounts) + " |")
    print("| --- |" + " ---: | ---: |" * len(mounts))
    for w in args.workloads:
        cells = []
        for t in mounts:
            gib = max(median(t, w, "gib"), 1e-9)
            cells.append(f"{median(t, w, 'cpu_owner_s') / gib:.2f} + {median(t, w, 'cpu_replicas_s') / gib:.2f}")
            peak = max(r["peak_owner_mib"] for r in rows[t, w])
            cells.append(f"{peak:.0f} / {max(r['peak_replica_mib'] for r in rows[t, w]):.0f}")
        print(f"| {w} | " + " | ".join(cells) + " |")
    if idle:
        print(f"\n100 idle images of 100 GiB: {idle[0]:.0f} MiB resident at their owner, "
              f"{max(idle[1:]):.0f} MiB at a replica.")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a run of some minutes that proves little")
    p.add_argument("--runtime", type=int, default=5)
    p.add_argument("--reps", type=int, default=3)
    p.add_argument("--size", type=int, default=1024)
    p.add_argument("--dir", default=None, help="where the scratch directory goes (default: TMPDIR)")
    p.add_argument("--json", default=None, help="also writes every single measurement there")
    p.add_argument("--workloads", default=",".join(WORKLOADS))
    p.add_argument("--targets", default="plain,0,1,2")
    p.add_argument("--no-idle", action="store_true", help="without the 100 idle images")
    args = p.parse_args()
    args.workloads, args.targets = args.workloads.split(","), args.targets.split(",")
    for name, known in [(w, WORKLOADS) for w in args.workloads] + [(t, TITLES) for t in args.targets]:
        if name not in known:
            p.error(f"{name} is none of {', '.join(known)}")
    if args.quick:
        args.runtime, args.reps, args.size = 2, 1, 256
    if os.geteuid() != 0:
        p.error("needs root (mounts, drop_caches)")
    return args


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    need_daemon = any(t != "plain" for t in args.targets)
    vmfs = vmfs_binary() if need_daemon else None
    work = tempfile.mkdtemp(prefix="vmfs-bench-", dir=args.dir)
    targets, rows, idle = {}, {}, None
    try:
        for t in args.targets:
            targets[t] = Plain(work) if t == "plain" else Cluster(vmfs, work, int(t) + 1, f"replicas-{t}")
        for t, target in targets.items():
            say(f"fill: {TITLES[t]}")
            fio(work, target.image, ["--rw=write", "--bs=1M", "--iodepth=8", f"--size={args.size}M", "--end_fsync=1"])
        for rep in range(args.reps):
            for w in args.workloads:
                for t, target in targets.items():
                    row = measure(args, work, target, w)
                    rows.setdefault((t, w), []).append(row)
                    say(f"{rep + 1}/{args.reps} {w}, {TITLES[t]}: {number(row['value'])} {WORKLOADS[w][0]}")
        if need_daemon and not args.no_idle and not args.quick:
            say("100 idle images")
            idle = idle_images(vmfs, work)
    finally:
        for target in targets.values():
            target.down()
        shutil.rmtree(work, ignore_errors=True)
    report(args, rows, idle)
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{"target": t, "workload": w, **r} for (t, w), rs in rows.items() for r in rs], f, indent=1)


if __name__ == "__main__":
    main()
