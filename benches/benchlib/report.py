"""The matrix as Markdown: medians with ratios, latencies, costs, and the check against the targets of issue 4."""
import statistics

from benchlib import plot
from benchlib.plot import number
from benchlib.setups import TITLES

OWNER = "1"  # the targets are for an owner with one replica
COLOURS = {"plain": "#57606a", "fuse-hp": "#8c959f", "0": "#79c0ff", "1": "#0969da", "2": "#0a3069"}


def colour(target):
    return COLOURS.get(target, "#bf8700" if target.startswith("qsd") else "#bf3989")


class Results:
    """Rows of run.py, by target and workload. Rows of failed runs have `error` instead of figures; noisy rows count
    only where there are no quiet ones."""

    def __init__(self, rows, missing):
        self.rows, self.missing = rows, missing
        self.targets = list(dict.fromkeys(r["target"] for r in rows))
        self.workloads = list(dict.fromkeys(r["workload"] for r in rows if r["workload"] != "fill"))

    def of(self, target, workload):
        good = [r for r in self.rows if (r["target"], r["workload"]) == (target, workload) and "error" not in r]
        return [r for r in good if not r["noisy"]] or good

    def failed(self, target, workload):
        return any("error" in r for r in self.rows if (r["target"], r["workload"]) == (target, workload))

    def values(self, target, workload, *path):
        out = []
        for row in self.of(target, workload):
            for key in path:
                row = (row or {}).get(key)
            out += [] if row is None else [row]
        return out

    def median(self, target, workload, *path):
        values = self.values(target, workload, *(path or ("value",)))
        return statistics.median(values) if values else None


def table(head, rows):
    out = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(out + ["| " + " | ".join(row) + " |" for row in rows])


def throughput(res, units):
    """Targets down, workloads across: there are more targets, and a reader compares within a column."""
    works = [w for w in res.workloads]
    rows = []
    for t in res.targets:
        cells = []
        for w in works:
            values, base = res.values(t, w, "value"), res.median("plain", w)
            if not values:
                cells.append("**failed**" if res.failed(t, w) else "-")
                continue
            median = statistics.median(values)
            spread = f" ({number(min(values))}-{number(max(values))})" if len(values) > 1 else ""
            ratio = f" **{median / base:.2f}x**" if base and t != "plain" else ""
            noisy = " ~" if all(r["noisy"] for r in res.of(t, w)) else ""
            failed = " (a run failed)" if res.failed(t, w) else ""
            cells.append(f"{number(median)}{spread}{ratio}{noisy}{failed}")
        rows.append([TITLES[t], *cells])
    return table(["target", *(f"{w}, {units[w]}" for w in works)], rows)


def latencies(res):
    rows = []
    for t in res.targets:
        cells = []
        for w in res.workloads:
            parts = []
            for side, letter in (("read", "r"), ("write", "w"), ("sync", "s")):
                p50, p99 = res.median(t, w, side, "p50"), res.median(t, w, side, "p99")
                if p50 is not None:
                    parts.append(f"{letter} {p50:.0f} / {p99:.0f}")
            cells.append(", ".join(parts) or "-")
        rows.append([TITLES[t], *cells])
    return table(["target", *res.workloads], rows)


def costs(res):
    rows = []
    for t in res.targets:
        cells = []
        for w in res.workloads:
            cpu = res.median(t, w, "cpu_s_per_gib")
            if cpu is None or not any(r["procs"] for r in res.of(t, w)):
                cells.append("-")
                continue
            peaks = [sorted((p["peak_mib"] for p in r["procs"]), reverse=True) for r in res.of(t, w)]
            cells.append(f"{cpu:.2f}; {max(p[0] for p in peaks):.0f} of {max(sum(p) for p in peaks):.0f}")
        rows.append([TITLES[t], *cells])
    return table(["target", *res.workloads], rows)


def settled(res):
    """Rates with the time until every replica holds everything: what the writes cost in the end."""
    rows = []
    for w in res.workloads:
        cells = []
        for t in ("0", "1", "2"):
            value, late = res.median(t, w, "settled_value"), res.median(t, w, "settle_s")
            cells.append("-" if value is None else f"{number(value)} ({late:.1f} s)")
        rows.append([w, *cells])
    return table(["workload", *(TITLES[t] for t in ("0", "1", "2"))], rows)


# ---- targets -------------------------------------------------------------------------------------------------

def peers_of(res, encrypted=False):
    names = [t for t in res.targets if t.startswith(("qsd-mirror", "qsd-quorum", "gluster"))]
    return [t for t in names if t.endswith("-tls")] if encrypted else names


def best(res, names, workload, *path, least=False):
    """(value, title) of the best of them: the highest, or for `least` the lowest."""
    found = [(res.median(t, workload, *path), TITLES[t]) for t in names]
    found = [f for f in found if f[0] is not None]
    return (min if least else max)(found) if found else (None, None)


def verdict(have, need, least=True):
    """`need` is a lower bound for have, or an upper one."""
    if have is None or need is None or not need:
        return "not measured"
    met = have >= need if least else have <= need
    return "met" if met else f"**missed by {abs(have - need) / need * 100:.0f} %**"


def check_row(what, bound, have, other, factor, unit, name, least=True):
    need = None if other is None else other * factor
    if have is None or need is None:
        return [what, bound, "-", "-", "not measured"]
    return [what, bound, f"{number(have)} {unit}", f"{have / other:.2f}x of {number(other)} ({name})",
            verdict(have, need, least)]


def checks(res, units):
    rows = []
    all_peers, encrypted = peers_of(res), peers_of(res, encrypted=True)

    def against(w, factor, other, name, bound):
        rows.append(check_row(w, bound, res.median(OWNER, w), other, factor, units[w], name))

    def against_one(w, factor, target, bound):
        against(w, factor, res.median(target, w), TITLES[target], bound)

    def against_best(w, factor, names, bound):
        against(w, factor, *best(res, names, w), bound)

    against_best("seq-write-1m", 1.0, encrypted, "1.0x the best encrypted peer")
    against_one("seq-write-1m", 1.5, "gluster2", "1.5x GlusterFS replica 2")
    against_one("seq-read-1m", 1.0, "plain", "1.0x the plain file")
    for w in ("rand-read-4k-qd1", "rand-read-4k-qd32"):
        against_one(w, 0.9, "fuse-hp", "0.9x the pass-through FUSE")
    against_one("rand-write-4k-qd1", 1.0, "plain", "1.0x the plain file")
    against_best("rand-write-4k-qd1", 4.0, all_peers, "4x the best peer")
    against_best("rand-write-4k-qd32", 3.0, all_peers, "3x the best peer")
    w = "write-4k-fdatasync"
    against_one(w, 0.6, "plain", "0.6x the plain file")
    against_best(w, 1.5, all_peers, "1.5x the best peer")
    other, name = best(res, all_peers, w, "sync", "p99", least=True)
    rows.append(check_row(w + ", sync p99", "no worse than the best peer's", res.median(OWNER, w, "sync", "p99"), other, 1.0,
                          "µs", name, least=False))
    against_best("mix-70-30-8k-qd16", 2.0, all_peers, "2x the best peer")
    rows.append(check_row("8-images-fdatasync", "3x one image's", res.median(OWNER, "8-images-fdatasync"),
                          res.median(OWNER, w), 3.0, "IOPS", "one image"))
    rows.append(check_row("CPU per GiB written (seq-write-1m)", "no more than mirror + TLS",
                          res.median(OWNER, "seq-write-1m", "cpu_s_per_gib"),
                          res.median("qsd-mirror-tls", "seq-write-1m", "cpu_s_per_gib"), 1.0, "s", TITLES["qsd-mirror-tls"],
                          least=False))
    for w in res.workloads:
        rows.append(check_row(f"{w}, 2 replicas", "0.7x of the row with one", res.median("2", w), res.median(OWNER, w), 0.7,
                              units[w], TITLES[OWNER]))
    peaks = [p["peak_mib"] for w in res.workloads for t in ("1", "2") for r in res.of(t, w) for p in r["procs"]]
    peak = max(peaks, default=None)
    rows.append(["memory at full load, the larger daemon", "under 512 MiB", "-" if peak is None else f"{peak:.0f} MiB", "",
                 verdict(peak, 512, least=False)])
    return rows


def markdown(res, units, heading, plot_name):
    noisy = sum(1 for r in res.rows if r.get("noisy"))
    failed = [r for r in res.rows if "error" in r]
    fills = [f"{TITLES[t]} {number(res.median(t, 'fill'))}" for t in res.targets if res.median(t, "fill")]
    parts = [heading]
    parts += [f"{len(res.rows)} measurements, of which {noisy} noisy (other processes of the machine used more than a "
              "quarter of a core; they count only where there is no quiet one: ~)."]
    parts += [f"Not measured: {TITLES[t]}: {why}." for t, why in res.missing.items()]
    parts += [f"Failed: {TITLES[r['target']]}, {r['workload']}: {r['error'].splitlines()[0][:200]}" for r in failed]
    parts += ["### Targets", table(["workload", "at least", "measured", "that is", "verdict"], checks(res, units))]
    parts += ["### Throughput", f"![throughput of every target]({plot_name})" if plot_name else "",
              "Median (range); ratio to the plain file.", throughput(res, units)]
    if fills:
        parts += ["First filling of the image (fresh file, sequential, 1 MiB, depth 8, with the fsync at its end), MiB/s: "
                  + ", ".join(fills) + "."]
    parts += ["### Latency", "Median / 99th percentile in µs; r read, w write, s fdatasync.", latencies(res)]
    parts += ["### Cost", "CPU seconds of all daemons per GiB moved; peak resident memory in MiB of the largest daemon, of all "
              "daemons together.", costs(res)]
    parts += ["### Until every replica has it", "Writes that no flush waits for return before the replicas have them (the lag "
              "is bounded). The same rates over the time until all replicas hold everything, and how long that took after "
              "the run:", settled(res)]
    return "\n\n".join(p for p in parts if p) + "\n"


def draw(res, units, path):
    panels = []
    for w in res.workloads:
        rows = []
        for t in res.targets:
            values = res.values(t, w, "value")
            rows.append((TITLES[t], t, statistics.median(values) if values else None, min(values, default=None),
                         max(values, default=None)))
        panels.append((f"{w}, {units[w]}", rows))
    plot.bars(path, "Throughput, side by side", panels, colour)
