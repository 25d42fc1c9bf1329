#!/usr/bin/env python3
"""The targets of issue 4 that are no fio workload:

    benches/targets.py --write-docs                # all four: about 10 minutes, on a quiet machine
    benches/targets.py --quick                     # small and once: about 3 minutes
    benches/targets.py --only promote,start        # some of: promote, catchup, start, memory
    benches/targets.py --render --write-docs       # the table again from docs/bench/targets.json

promote   Three hosts, a sparse 100 GiB image in sync. The owner is killed with SIGKILL, `vmfs promote` follows on
          another host: at once, and again after 2 s; and with the owner alive. Time of the command, and until a
          write with fsync has succeeded. The old owner comes back each time.
catchup   Three hosts. A guest writes 4 KiB + fdatasync, 200 a second at most, beside a load of 16 KiB random writes
          of limited rate over a 4 GiB image. One replica is killed for 60 s and comes back. Rate: what was written
          while it was away and until it was in sync, by the time that took; compared with the rate at which the same
          cluster takes a sequential write to the end (last replica in sync). Latency: the guest's 99th percentile
          in that time against that with all replicas in sync just before.
start     Hosts with 100 images of 100 GiB; --updates random writes to each, then SIGKILL and start, with a cold page
          cache; time until the mount answers, and until a write with fsync has succeeded on the first and on all
          images. On one host alone; with three hosts of which the owner is killed; and with all three killed and
          started at once. Needs about 20 GiB of disk.
memory    Two hosts, 100 idle images of 100 GiB: resident memory. Then 16 fio jobs at full rate on 16 of them (four
          each of sequential, random, mixed, with fdatasync): peak. Then, idle again for 10 s: resident memory.

Needs root, /dev/fuse, fio. Builds the release binary unless VMFS_BIN names one. All in one scratch directory, gone at
the end, also after a failure or Ctrl-C.
"""
import argparse
import concurrent.futures
import contextlib
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time

from benchlib import docs
from benchlib.host import Failure, drop_caches, fio, machine, memory_mib, reset_peak, say, scratch
from benchlib.report import table, verdict
from benchlib.setups import Cluster, bring_up, vmfs_binary

GIB = 1 << 30


class Bench:
    def __init__(self, args, work, undo, vmfs):
        self.args, self.work, self.undo, self.vmfs = args, work, undo, vmfs

    @contextlib.contextmanager
    def cluster(self, host_count, name):
        cluster = Cluster(self.vmfs, self.work, host_count, name)
        bring_up(cluster, self.undo)
        try:
            yield cluster
        finally:
            cluster.down()


def write_synced(path, offset=0):
    with open(path, "r+b", buffering=0) as f:
        os.pwrite(f.fileno(), os.urandom(4096), offset)
        os.fsync(f.fileno())


def sparse_image(path, gib, pieces):
    with open(path, "wb", buffering=0) as f:
        f.truncate(gib * GIB)
        for at in range(pieces):
            os.pwrite(f.fileno(), os.urandom(65536), at * (gib * GIB // pieces) // 4096 * 4096)
        os.fsync(f.fileno())


def kill(cluster, *hosts):
    """SIGKILL, and away with the mounts that the dead leave."""
    for pid in [cluster.pid(h) for h in hosts]:
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}/exe") and open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.002)


def start_daemons(cluster, *hosts):
    """As `vmfs up` does it, without waiting for anything."""
    for h in hosts:
        directory = os.path.join(cluster.dir, h)
        with open(os.path.join(directory, "vmfs.log"), "a") as log:
            subprocess.Popen(["vmfs-fuse", "--config", os.path.join(directory, "vmfs.toml")], executable=cluster.vmfs,
                             cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def until(what, limit_s, attempt):
    end = time.monotonic() + limit_s
    while True:
        try:
            result = attempt()
            if result is not False:
                return result
        except (OSError, ValueError, Failure) as e:
            last = e
        else:
            last = "not yet"
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {limit_s} s ({last})")
        time.sleep(0.005)


def summary(values, scale=1.0, digits=2):
    """Median and range, as text."""
    v = [x * scale for x in values]
    text = f"{statistics.median(v):.{digits}f}"
    return text if len(v) == 1 else f"{text} ({min(v):.{digits}f}-{max(v):.{digits}f})"


# ---- promote -------------------------------------------------------------------------------------------------

def promote(bench):
    """One row for each way: {way: [{command_s, write_s, elapsed_ms}]}."""
    out = {}
    with bench.cluster(3, "promote") as cluster:
        sparse_image(cluster.path("big.img"), 100, 100)
        cluster.wait_in_sync("big.img")
        owner = "a"
        for _rep in range(bench.args.reps):
            for way in ("owner just killed", "owner killed 2 s before", "owner alive"):
                to = next(h for h in "abc" if h != owner)
                if way != "owner alive":
                    kill(cluster, owner)
                    time.sleep(2 if "2 s" in way else 0)
                start = time.monotonic()
                said = json.loads(cluster.cli(to, "promote", "big.img", "--json").stdout)
                command_s = time.monotonic() - start
                until("a write after the promotion", 10, lambda to=to: write_synced(cluster.path("big.img", to)))
                row = {"command_s": command_s, "write_s": time.monotonic() - start,
                       "elapsed_ms": said.get("elapsed_ms"), "loss": said.get("loss", {}).get("kind")}
                out.setdefault(way, []).append(row)
                say(f"promote, {way}: {command_s:.3f} s, written after {row['write_s']:.3f} s, {row['loss']}")
                if way != "owner alive":
                    start_daemons(cluster, owner)
                    until("the old owner is back", 30, lambda h=owner: cluster.status(h) and True)
                owner = to
                cluster.wait_in_sync("big.img", owner)
    return out


def promote_rows(found):
    rows = []
    for way, runs in found.items():
        worst = max(r["command_s"] for r in runs)
        rows.append([f"promote an in-sync 100 GiB image, {way}", "under 0.3 s",
                     f"{summary([r['command_s'] for r in runs], digits=3)} s",
                     f"written and flushed after {summary([r['write_s'] for r in runs], digits=3)} s",
                     verdict(worst, 0.3, least=False)])
    return rows


# ---- catch-up ------------------------------------------------------------------------------------------------

class Guest(threading.Thread):
    """4 KiB + fdatasync at random places, at most 200 a second; keeps when each began and how long it took."""

    def __init__(self, path, size):
        super().__init__(daemon=True)
        self.path, self.size, self.samples, self.stop, self.error = path, size, [], threading.Event(), None

    def run(self):
        page = mmap.mmap(-1, 4096)
        page.write(os.urandom(4096))
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        try:
            while not self.stop.is_set():
                start = time.monotonic()
                os.pwrite(fd, page, random.randrange(self.size // 4096) * 4096)
                os.fdatasync(fd)
                took = time.monotonic() - start
                self.samples.append((start, took))
                self.stop.wait(max(0.005 - took, 0))
        except OSError as e:
            self.error = e
        finally:
            os.close(fd)

    def p99_ms(self, begin, end):
        took = sorted(t for at, t in self.samples if begin <= at < end)
        return took[int(len(took) * 0.99)] * 1000 if took else None


def member(cluster, image, host):
    for found in cluster.status()["images"]:
        if found["path"] == image:
            return next(m for m in found["members"] if m["host"] == host)
    raise Failure(f"{image} is not known")


def sequential_rate(bench, cluster, size_mib):
    """MiB/s of a sequential write over an image that was written before, until all replicas hold it."""
    start = time.monotonic()
    fio(bench.work, [cluster.path("load.img")], ["--rw=write", "--bs=1M", "--iodepth=8", f"--size={size_mib}M"])
    cluster.wait_in_sync("load.img")
    return size_mib / (time.monotonic() - start)


def load(bench, cluster, size_mib, seconds):
    """The load beside the guest, in the background; gives back how many bytes it wrote."""
    return fio(bench.work, [cluster.path("load.img")],
               ["--rw=randwrite", "--bs=16k", "--iodepth=4", f"--size={size_mib}M", "--time_based",
                f"--runtime={seconds}", f"--rate={bench.args.load_rate}m"])["write"]["io_bytes"]


def catchup(bench):
    args = bench.args
    size_mib = args.size
    with bench.cluster(3, "catchup") as cluster, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fio(bench.work, [cluster.path("load.img")], ["--rw=write", "--bs=1M", "--iodepth=8", f"--size={size_mib}M"])
        sparse_image(cluster.path("guest.img"), 1, 64)
        cluster.wait_in_sync("load.img")
        rates = [sequential_rate(bench, cluster, size_mib) for _ in range(args.reps)]
        say(f"sequential, until in sync: {summary(rates, digits=0)} MiB/s")
        guest = Guest(cluster.path("guest.img"), 64 << 20)
        guest.start()
        try:
            # Before: the same load with everybody there.
            before_s, away_s = (5 if args.quick else 20), args.away
            quiet = time.monotonic()
            load(bench, cluster, size_mib, before_s)
            cluster.wait_in_sync("load.img")
            quiet_end = time.monotonic()
            kill(cluster, "c")
            away = pool.submit(load, bench, cluster, size_mib, away_s)
            missed = away.result()
            # Random writes leave superseded data in the log: longer would need much disk.
            limit_s = 240
            running = pool.submit(load, bench, cluster, size_mib, limit_s)
            back = time.monotonic()
            start_daemons(cluster, "c")
            until("the replica is there again", 60, lambda: member(cluster, "load.img", "c")["state"] not in
                  ("offline", "unknown"))
            linked = time.monotonic()
            states = []
            while (m := member(cluster, "load.img", "c"))["state"] != "in-sync":
                if not states or states[-1] != m["state"]:
                    states.append(m["state"])
                if time.monotonic() - back > limit_s - 20 or running.done():
                    raise Failure(f"not in sync after {time.monotonic() - back:.0f} s under load: {m}")
                time.sleep(0.1)
            done = time.monotonic()
        finally:
            guest.stop.set()
            guest.join(30)
        stop_fio(bench.work)
        with contextlib.suppress(Failure):
            running.result()
        if guest.error:
            raise Failure(f"the guest's write failed: {guest.error}")
    copied = missed / 2**20 + args.load_rate * (done - back)
    row = {"away_s": args.away, "sequential_mib_s": rates, "missed_mib": missed / 2**20, "states": states, "reconnect_s": linked - back,
           "catchup_s": done - back, "rate_mib_s": copied / (done - back),
           "p99_before_ms": guest.p99_ms(quiet, quiet_end), "p99_during_ms": guest.p99_ms(back, done),
           "p99_away_ms": guest.p99_ms(quiet_end, back)}
    say(f"catch-up: {json.dumps(row)}")
    return row


def stop_fio(work):
    """Ends the load that is still running: the fio of this scratch directory, by its process id."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
            if command[0] == b"fio" and any(work.encode() + b"/" in c for c in command):
                os.kill(int(pid), signal.SIGINT)


def catchup_rows(r):
    sequential, rate = statistics.median(r["sequential_mib_s"]), r["rate_mib_s"]
    factor = r["p99_during_ms"] / r["p99_before_ms"]
    return [
        [f"catch-up after {r['away_s']} s away under load", "80 % of the sequential rate", f"{rate:.0f} MiB/s",
         f"{rate / sequential * 100:.0f} % of {sequential:.0f} MiB/s; {r['missed_mib']:.0f} MiB missed, {r['catchup_s']:.1f} s "
         f"({', '.join(r['states'])})", verdict(rate, 0.8 * sequential)],
        ["guest latency meanwhile, p99 of 4 KiB + fdatasync", "at most doubled", f"{r['p99_during_ms']:.2f} ms",
         f"{factor:.2f}x of {r['p99_before_ms']:.2f} ms (while away {r['p99_away_ms']:.2f} ms)",
         verdict(factor, 2.0, least=False)]]


# ---- start ---------------------------------------------------------------------------------------------------

def image_paths(cluster, count):
    return [cluster.path(f"vm-{i:03}.img") for i in range(count)]


def make_images(cluster, count):
    for path in image_paths(cluster, count):
        sparse_image(path, 100, 8)
    cluster.settle(image_paths(cluster, count))


def update_images(bench, cluster, count, updates):
    """So many random 4 KiB writes to each, all images at once, and a flush of each: what a start has to read again."""
    paths = image_paths(cluster, count)
    fio(bench.work, paths, ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=100G", f"--number_ios={updates}",
                            "--end_fsync=1", "--thread"])
    cluster.settle(paths)


def mounted(cluster, host, count):
    directory = cluster.path("", host).rstrip("/")
    return os.path.ismount(directory) and len(os.listdir(directory)) >= count


def start_once(cluster, count, killed):
    kill(cluster, *killed)
    drop_caches()
    start = time.monotonic()
    start_daemons(cluster, *killed)
    until("the mount answers", 60, lambda: mounted(cluster, "a", count))
    row = {"mount_s": time.monotonic() - start}
    for i in range(count):
        until(f"image {i} can be written", 60, lambda i=i: write_synced(cluster.path(f"vm-{i:03}.img")))
        row.setdefault("first_s", time.monotonic() - start)
    row["all_s"] = time.monotonic() - start
    return row


def start(bench):
    count, updates = (20, 100) if bench.args.quick else (100, bench.args.updates)
    out = {}
    for host_count, ways in ((1, {"one host": "a"}), (3, {"owner of three hosts": "a", "all three hosts": "abc"})):
        with bench.cluster(host_count, f"start-{host_count}") as cluster:
            make_images(cluster, count)
            for _ in range(bench.args.reps):
                for name, killed in ways.items():
                    update_images(bench, cluster, count, updates)
                    row = start_once(cluster, count, killed)
                    out.setdefault(name, []).append({**row, "images": count})
                    say(f"start, {name}: {json.dumps(row)}")
                    cluster.settle(image_paths(cluster, count))
    return out


def start_rows(found):
    return [[f"start after SIGKILL with {runs[0]['images']} images of 100 GiB, {name}", "under 5 s to serving",
             f"{summary([r['all_s'] for r in runs])} s", f"mount {summary([r['mount_s'] for r in runs])} s, first image written "
             f"{summary([r['first_s'] for r in runs])} s, all of them as measured",
             verdict(max(r["all_s"] for r in runs), 5, least=False)] for name, runs in found.items()]


# ---- memory --------------------------------------------------------------------------------------------------

def memory(bench):
    count, seconds = (20, 5) if bench.args.quick else (100, 30)
    with bench.cluster(2, "memory") as cluster:
        make_images(cluster, count)
        time.sleep(5)
        idle = {role: memory_mib(pid, "VmRSS") for pid, role in cluster.daemons().items()}
        for pid in cluster.pids():
            reset_peak(pid)
        common = ["--size=1G", "--time_based", f"--runtime={seconds}"]
        jobs = [["--rw=write", "--bs=1M", "--iodepth=8"], ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
                ["--rw=randrw", "--bs=8k", "--iodepth=16"], ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--fdatasync=1"]] * 4
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(lambda k: fio(bench.work, [cluster.path(f"vm-{k:03}.img")], [*jobs[k], *common]), range(len(jobs))))
        cluster.settle(image_paths(cluster, len(jobs)))
        peak = {role: memory_mib(pid, "VmHWM") for pid, role in cluster.daemons().items()}
        time.sleep(10)
        after = {role: memory_mib(pid, "VmRSS") for pid, role in cluster.daemons().items()}
    row = {"images": count, "idle": idle, "peak": peak, "after": after}
    say(f"memory: {json.dumps(row)}")
    return row


def memory_rows(r):
    rows = []
    for what, limit, key in ((f"memory, {r['images']} idle images of 100 GiB", 200, "idle"),
                             ("memory at full load, 16 images at once", 512, "peak"),
                             ("memory 10 s after that load", 200, "after")):
        worst = max(r[key].values())
        rows.append([what, f"under {limit} MiB", ", ".join(f"{role} {mib:.0f} MiB" for role, mib in r[key].items()), "",
                     verdict(worst, limit, least=False)])
    return rows


# ---- all together --------------------------------------------------------------------------------------------

PARTS = {"promote": (promote, promote_rows), "catchup": (catchup, catchup_rows), "start": (start, start_rows),
         "memory": (memory, memory_rows)}


def present(args):
    data = json.load(open(args.json))
    info = data["about"]
    rows = [row for name, (_, rows_of) in PARTS.items() if name in data["found"] for row in rows_of(data["found"][name])]
    text = (f"    {info['command']}\n\n{info['machine']}; {info['date']}. The worst repetition decides, shown are the median and "
            f"the range of {info['reps']}.\n\n" + table(["what", "at least", "measured", "that is", "verdict"], rows) + "\n")
    text += "".join(f"\nFailed: {name}: {why}\n" for name, why in data["failed"].items())
    print(text)
    if args.write_docs:
        docs.put("targets", text)
        say(f"written: {docs.PAGE}")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--only", default=",".join(PARTS))
    p.add_argument("--reps", type=int, default=None, help="[3]")
    p.add_argument("--updates", type=int, default=1000, help="random writes to each image before the kill [1000]")
    p.add_argument("--load-rate", type=int, default=30, help="MiB/s of the load beside the guest [30]")
    p.add_argument("--away", type=int, default=None, help="seconds that the replica of `catchup` is away [60]")
    p.add_argument("--size", type=int, default=None, help="MiB of the image of `catchup` [4096]")
    p.add_argument("--dir", default=None, help="where the scratch directory goes [TMPDIR]")
    p.add_argument("--json", default=None, help="raw results [docs/bench/targets.json with --write-docs]")
    p.add_argument("--write-docs", action="store_true")
    p.add_argument("--render", action="store_true")
    args = p.parse_args()
    args.only = args.only.split(",")
    for name in args.only:
        if name not in PARTS:
            p.error(f"{name} is none of {', '.join(PARTS)}")
    args.size = args.size or (512 if args.quick else 4096)
    args.away = args.away or (8 if args.quick else 60)
    args.reps = args.reps or (1 if args.quick else 3)
    in_docs = os.path.join(docs.FOLDER, "targets.json")
    args.json = args.json or (in_docs if args.write_docs or args.render else os.path.abspath("targets.json"))
    if os.geteuid() != 0 and not args.render:
        p.error("needs root")
    return args


def main():
    args = arguments()
    if args.render:
        return present(args)
    if args.write_docs:
        docs.folder()
    data = {"about": {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "reps": args.reps,
                      "command": " ".join(["benches/targets.py", *sys.argv[1:]])}, "found": {}, "failed": {}}
    with scratch(args.dir) as (work, undo):
        vmfs = vmfs_binary()
        for name in args.only:
            try:
                data["found"][name] = PARTS[name][0](Bench(args, work, undo, vmfs))
            except (Failure, OSError) as e:
                data["failed"][name] = str(e)
                say(f"FAILED: {name}: {e}")
            with open(args.json, "w") as f:
                json.dump(data, f, indent=1)
    present(args)
    if data["failed"]:
        sys.exit("targets.py: some failed (see above)")


if __name__ == "__main__":
    main()
