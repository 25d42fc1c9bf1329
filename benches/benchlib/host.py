"""The machine: running commands, accounting of CPU and memory, fio, and a scratch directory that leaves nothing."""
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TICKS = os.sysconf("SC_CLK_TCK")
# A run is noisy when processes that are not accounted for used more than this many cores on average.
NOISE_CORES_MAX = 0.25


class Failure(Exception):
    """A command or a measurement failed; the text says which and why."""


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run(command, timeout_s=120, check=True, **options):
    """Runs a command in a session of its own, so that Ctrl-C reaches this program only; ends it when interrupted."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    child = subprocess.Popen(command, start_new_session=True, **options)
    try:
        out, err = child.communicate(timeout=timeout_s)
    except BaseException as e:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
                break
        if isinstance(e, subprocess.TimeoutExpired):
            raise Failure(f"{' '.join(command)}: not done after {timeout_s} s") from None
        raise
    if check and child.returncode:
        raise Failure(f"{' '.join(command)}: exit code {child.returncode}\n{(err or out or '').strip()[-1500:]}")
    return subprocess.CompletedProcess(command, child.returncode, out, err)


# ---- scratch -------------------------------------------------------------------------------------------------

def mounts_below(directory):
    """Mount points at or below a directory, innermost first."""
    found = []
    for line in open("/proc/self/mountinfo"):
        path = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4])
        if path == directory or path.startswith(directory + "/"):
            found.append(path)
    return sorted(found, key=len, reverse=True)


def processes_naming(directory):
    """Processes with a path in that directory in their command line. It is a fresh one, so all of them are ours."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = open(f"/proc/{pid}/cmdline", "rb").read().decode(errors="replace")
            if directory + "/" in command and int(pid) not in (os.getpid(), os.getppid()):
                found.append(int(pid))
    return found


def sweep(directory):
    """Takes away what the ordinary ways of taking down have left: processes, mounts, files."""
    for sig, wait_s in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        for pid in processes_naming(directory):
            say(f"sweep: process {pid} was left; {sig.name}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, sig)
        end = time.monotonic() + wait_s
        while processes_naming(directory) and time.monotonic() < end:
            time.sleep(0.1)
    for path in mounts_below(directory):
        run(["umount", "-l", path], check=False)
    if mounts_below(directory):
        say(f"sweep: {mounts_below(directory)} cannot be unmounted; {directory} stays")
        return
    shutil.rmtree(directory, ignore_errors=True)


def stop_on_signals():
    def stop(number, _frame):
        raise SystemExit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


@contextlib.contextmanager
def scratch(parent=None, last=lambda: None):
    """A fresh directory and a stack of clean-ups. At the end, however it comes, the clean-ups run in reverse order,
    each whatever the others do, deaf to signals; then the sweep; then `last`."""
    stop_on_signals()
    work = tempfile.mkdtemp(prefix="vmfs-bench-", dir=parent)
    undo = []
    try:
        yield work, undo
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for what in reversed(undo):
            try:
                what()
            except Exception as e:  # the next one has to run all the same
                say(f"clean-up: {e}")
        sweep(work)
        last()
        stop_on_signals()


# ---- accounting ----------------------------------------------------------------------------------------------

def cpu_s(pid):
    try:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(pid, key):
    found = re.search(rf"^{key}:\s+(\d+) kB", open(f"/proc/{pid}/status").read(), re.M)
    return int(found[1]) / 1024 if found else 0.0


def reset_peak(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as f:
        f.write("5")


def busy_s():
    """CPU seconds that the machine has spent on anything, and that were stolen from it."""
    f = [int(x) / TICKS for x in open("/proc/stat").readline().split()[1:]]
    return f[0] + f[1] + f[2] + f[5] + f[6], f[7]


def kernel_threads_s():
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            f = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
            if f[1] == "2":
                total += int(f[11]) + int(f[12])
    return total / TICKS


class Account:
    """What happens between its making and `end`: CPU of the given daemons, of the children, of everybody else."""

    def __init__(self, daemons):
        self.daemons = daemons
        for pid in daemons:
            reset_peak(pid)
        self.before = {pid: cpu_s(pid) for pid in daemons}
        self.kernel, self.children = kernel_threads_s(), resource.getrusage(resource.RUSAGE_CHILDREN)
        (self.busy, self.stolen), self.start = busy_s(), time.monotonic()

    def end(self):
        wall = time.monotonic() - self.start
        busy, stolen = busy_s()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        procs = [{"pid": pid, "role": role, "cpu_s": round(cpu_s(pid) - self.before[pid], 3),
                  "peak_mib": round(memory_mib(pid, "VmHWM"), 1) if os.path.exists(f"/proc/{pid}") else 0}
                 for pid, role in self.daemons.items()]
        cpu = sum(p["cpu_s"] for p in procs)
        client = children.ru_utime + children.ru_stime - self.children.ru_utime - self.children.ru_stime
        own = cpu + client + kernel_threads_s() - self.kernel
        other = max(busy - self.busy - own, 0)
        return {"procs": procs, "cpu_s": cpu, "client_cpu_s": client, "busy_s": busy - self.busy,
                "stolen_s": stolen - self.stolen, "other_s": other, "wall_s": wall,
                "noisy": other > NOISE_CORES_MAX * wall}


def wait_quiet(limit_s):
    """Waits until the machine uses less than 0.3 cores over 2 s, at most `limit_s`."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = busy_s()[0]
        time.sleep(2)
        if busy_s()[0] - before < 0.6:
            return True
    return limit_s <= 0


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("1")


def machine():
    cpu = re.search(r"^model name\s*: (.*)$", open("/proc/cpuinfo").read(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, check=False).stdout.strip()
    return (f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}, {memory:.0f} GiB, "
            f"Linux {platform.release()}, {run(['fio', '--version']).stdout.strip()}, commit {commit}")


# ---- fio -----------------------------------------------------------------------------------------------------

def fio(work, paths, options, timeout_s=1800, each_once=False):
    """One fio job for each path, all at once, their figures together: {read, write, sync} as fio's JSON has them. Random
    places are independent of each other, or with `each_once` a random order of all."""
    common = ["--ioengine=libaio", "--direct=1", "--randrepeat=0", *([] if each_once else ["--norandommap"]),
              "--group_reporting", "--output-format=json", *options]
    jobs = [f for i, path in enumerate(paths) for f in (f"--name=job{i}", f"--filename={path}", *common)]
    done = run(["fio", *jobs], cwd=work, timeout_s=timeout_s, check=False)
    if done.returncode or "{" not in done.stdout:
        raise Failure(f"fio failed: fio {' '.join(jobs)}\n{(done.stderr or done.stdout)[-1500:]}")
    report = json.loads(done.stdout[done.stdout.index("{"):])["jobs"]
    if len(report) != 1 or report[0]["error"]:
        raise Failure(f"fio reports {len(report)} groups, error {report[0]['error']}: fio {' '.join(jobs)}")
    return report[0]


def latency(side, key="clat_ns"):
    """Microseconds from one side of fio's report; none when it has none."""
    lat = side.get(key, {})
    at = lambda p: round(lat["percentile"][f"{p:.6f}"] / 1000, 1)
    if not lat.get("N") or "percentile" not in lat:
        return None
    return {"p50": at(50), "p99": at(99), "p999": at(99.9), "max": round(lat["max"] / 1000, 1)}
