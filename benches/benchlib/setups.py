"""What is measured: a plain file, our clusters, and the peers that a user would pick instead. Each has `up`, `image`,
`images(count)` (further images beside it), `daemons` (pid -> role), `settle` and `down` (which may be called twice)."""
import json
import os
import shutil
import socket
import time

from benchlib.host import ROOT, Failure, run, say

NAMESPACE = "peers-gluster"  # peers.sh puts GlusterFS in there
PEERS = ("qsd-mirror", "qsd-mirror-tls", "qsd-quorum", "qsd-quorum-tls", "gluster2", "gluster3")
PEERS_MORE = ("qsd-fuse", "qsd-fuse-pc", "gluster2-tls", "gluster3-tls")
TITLES = {
    "plain": "plain file", "fuse-hp": "pass-through FUSE, no replica", "0": "VMFS, no replica",
    "1": "VMFS, 1 replica", "2": "VMFS, 2 replicas", "3": "VMFS, 3 replicas", "4": "VMFS, 4 replicas",
    "qsd-mirror": "QEMU mirror", "qsd-mirror-tls": "QEMU mirror + TLS", "qsd-quorum": "QEMU quorum",
    "qsd-quorum-tls": "QEMU quorum + TLS", "gluster2": "GlusterFS replica 2", "gluster3": "GlusterFS replica 3",
    "qsd-fuse": "QEMU FUSE export, no replica", "qsd-fuse-pc": "the same, page cache below",
    "gluster2-tls": "GlusterFS replica 2 + TLS", "gluster3-tls": "GlusterFS replica 3 + TLS",
}
COPIES = {name: 3 if "3" in name else 1 if name.startswith("qsd-fuse") else 2 for name in PEERS + PEERS_MORE}
DEFAULT_TARGETS = ("plain", "fuse-hp", "0", "1", "2", *PEERS)


def vmfs_binary():
    """The release binary, built if need be, or the one that VMFS_BIN names."""
    if os.environ.get("VMFS_BIN"):
        return os.path.abspath(os.environ["VMFS_BIN"])
    say("build of the release binary")
    out = run(["cargo", "build", "--release", "--bin", "vmfs", "--message-format=json-render-diagnostics"],
              cwd=ROOT, timeout_s=3600, stderr=None).stdout
    for line in out.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == "vmfs" and message.get("executable"):
            return message["executable"]
    raise Failure("cargo did not say where vmfs is")


class Plain:
    """Files on the disk that all the others are on."""

    def __init__(self, work):
        self.dir = os.path.join(work, "plain")
        self.image = os.path.join(self.dir, "bench.img")

    def up(self):
        os.makedirs(self.dir)

    def images(self, count, _mib):
        return [os.path.join(self.dir, f"many-{i}.img") for i in range(count)]

    def daemons(self):
        return {}

    def settle(self, paths=None):
        pass

    def down(self):
        shutil.rmtree(self.dir, ignore_errors=True)


class Cluster:
    """`vmfs up` with a number of hosts on loopback; the images are on host a's mount."""

    def __init__(self, vmfs, work, host_count, name):
        self.vmfs, self.dir, self.hosts = vmfs, os.path.join(work, name), "abcde"[:host_count]
        self.image = self.path("bench.img")

    def up(self):
        run([self.vmfs, "up", self.dir, "--hosts", str(len(self.hosts)), "--detach"], timeout_s=120)

    def path(self, name, host="a"):
        return os.path.join(self.dir, host, "mnt", name)

    def images(self, count, _mib):
        return [self.path(f"many-{i}.img") for i in range(count)]

    def pid(self, host):
        return int(open(os.path.join(self.dir, host, "vmfs.pid")).read())

    def pids(self):
        return [self.pid(h) for h in self.hosts]

    def daemons(self):
        return {pid: "owner" if i == 0 else "replica" for i, pid in enumerate(self.pids())}

    def cli(self, host, *args, timeout_s=660, check=True):
        return run([self.vmfs, "--socket", os.path.join(self.dir, host, "vmfs.sock"), *args], timeout_s=timeout_s,
                   check=check)

    def status(self, host="a"):
        return json.loads(self.cli(host, "status", "--json").stdout)

    def wait_in_sync(self, image="bench.img", host="a", timeout_s=600):
        self.cli(host, "wait", image, "--in-sync", "--timeout", str(timeout_s))

    def settle(self, paths=None):
        """What the replicas still have to do for the writes of a run belongs to its price."""
        for path in paths or [self.image]:
            self.wait_in_sync(os.path.basename(path))

    def down(self):
        if os.path.isdir(self.dir):
            run([self.vmfs, "down", self.dir], check=False)
            # A daemon that died has left its mount; nothing below it may be taken for a file of ours.
            for host in self.hosts:
                run(["umount", "-l", self.path("", host).rstrip("/")], check=False)


class Peers:
    """The scripts in the peers' directory, and why which of them cannot be used."""

    def __init__(self, directory, tools, work, size_mib):
        self.script = os.path.join(directory, "peers.sh")
        self.directory, self.tools, self.work = directory, tools, os.path.join(work, "peers")
        os.makedirs(self.work)
        if os.path.isdir(tools):
            os.symlink(os.path.abspath(tools), os.path.join(self.work, "tools"))
        self.env = {**os.environ, "WORK": self.work, "SIZE_MB": str(size_mib), "NBD_PORT": str(free_ports(6))}

    def why_not(self, name):
        """Nothing, or what is missing for that peer and how to get it."""
        tool = "passthrough_hp" if name == "fuse-hp" else "qsd-fixed" if name.startswith("qsd-") else None
        if not os.path.exists(self.script):
            return f"{self.directory} has no peers.sh (--peers DIR)"
        if tool and not os.access(os.path.join(self.tools, tool), os.X_OK):
            return f"{tool} is not in {self.tools}: run {self.directory}/get-tools.sh, or give its directory by --tools"
        if name.startswith("gluster"):
            if not (shutil.which("glusterd") and shutil.which("glusterfs")):
                return "GlusterFS is not installed: apt-get install glusterfs-server glusterfs-client"
            if os.path.exists(f"/run/netns/{NAMESPACE}"):
                return f"the namespace {NAMESPACE} is there already: another run has GlusterFS up, or left it"
        return None

    def call(self, *args, timeout_s=240, check=True):
        # To a file: a daemon that keeps the script's standard output open would keep a pipe open, too.
        log = os.path.join(self.work, "peers.log")
        with open(log, "w") as out:
            done = run([self.script, *args], timeout_s=timeout_s, check=False, env=self.env, stdout=out, stderr=out)
        text = open(log).read()
        if check and done.returncode:
            raise Failure(f"peers.sh {' '.join(args)}: exit code {done.returncode}\n{text.strip()[-1500:]}")
        return text.strip()


def without_namespace():
    """What takes GlusterFS's namespace away after everything else, when it was not there before: it stays when the start
    of GlusterFS is interrupted."""
    there = os.path.exists(f"/run/netns/{NAMESPACE}")

    def remove():
        if not there and os.path.exists(f"/run/netns/{NAMESPACE}"):
            run(["ip", "netns", "del", NAMESPACE], check=False)
    return remove


def free_ports(count):
    """The first of so many TCP ports of loopback in a row that are free now."""
    for base in range(20809, 30000, 16):
        try:
            for port in range(base, base + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise Failure("no free TCP ports on loopback")


class Peer:
    """One peer of peers.sh."""

    def __init__(self, peers, name):
        self.peers, self.name, self.dir = peers, name, os.path.join(peers.work, name)
        self.image, self.more = None, []

    def up(self):
        self.peers.call("up", self.name)
        self.image = self.peers.call("path", self.name)

    def daemons(self):
        return {int(pid): open(f"/proc/{pid}/comm").read().strip() for pid in self.peers.call("pids", self.name).split()}

    def images(self, count, mib):
        if not self.name.startswith("qsd-"):
            return [os.path.join(os.path.dirname(self.image), f"many-{i}.raw") for i in range(count)]
        while len(self.more) < count:
            self.more.append(self.one_more(len(self.more) + 1, mib))
        return self.more[:count]

    def qmp(self, daemon, command, arguments, *more):
        run(["python3", os.path.join(self.peers.directory, "qmp.py"), os.path.join(self.dir, f"{daemon}.qmp"), command,
             json.dumps(arguments), *more])

    def node(self, daemon, i, mib):
        """A raw image of its own in one of the daemons, like the first one that peers.sh made."""
        path = os.path.join(self.dir, f"{daemon}-{i}.raw")
        with open(path, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, mib << 20)
        direct = not self.name.endswith("-pc")
        file = {"driver": "file", "node-name": f"file{i}", "filename": path, "cache": {"direct": direct},
                "aio": "native" if direct else "threads", "discard": "unmap"}
        self.qmp(daemon, "blockdev-add", file)
        self.qmp(daemon, "blockdev-add", {"driver": "raw", "node-name": f"raw{i}", "file": f"file{i}"})
        return f"raw{i}"

    def one_more(self, i, mib):
        """A further image in the daemons that are there, as one VM host would have it: exported, mirrored."""
        top = self.node("main", i, mib)
        if "mirror" in self.name or "quorum" in self.name:
            self.qmp("replica", "block-export-add", {"type": "nbd", "id": f"exp{i}", "writable": True, "name": f"disk{i}",
                                                     "node-name": self.node("replica", i, mib)})
            port = int(self.peers.env["NBD_PORT"]) + 2 * ("quorum" in self.name) + self.name.endswith("-tls")
            remote = {"driver": "nbd", "node-name": f"remote{i}", "export": f"disk{i}",
                      "server": {"type": "inet", "host": "127.0.0.1", "port": str(port)}}
            if self.name.endswith("-tls"):
                remote.update({"tls-creds": "tls0", "tls-hostname": "localhost"})
            self.qmp("main", "blockdev-add", remote)
        if "quorum" in self.name:
            self.qmp("main", "blockdev-add", {"driver": "quorum", "node-name": f"quorum{i}", "vote-threshold": 2,
                                              "read-pattern": "fifo", "children": [top, f"remote{i}"]})
            top = f"quorum{i}"
        mount = os.path.join(self.dir, f"disk-{i}.raw")
        open(mount, "w").close()
        self.qmp("main", "block-export-add", {"type": "fuse", "id": f"exp{i}", "node-name": top, "mountpoint": mount,
                                              "writable": True, "growable": False, "allow-other": "off"})
        if "mirror" in self.name:
            self.qmp("main", "blockdev-mirror", {"job-id": f"mirror{i}", "device": top, "target": f"remote{i}", "sync": "full",
                                                 "copy-mode": "write-blocking"}, "--wait", "BLOCK_JOB_READY")
        return mount

    def settle(self, paths=None):
        pass

    def down(self):
        for mount in self.more:
            run(["umount", "-l", mount], check=False)
        if os.path.exists(self.dir):
            self.peers.call("down", self.name, check=False)


def make(name, vmfs, peers, work):
    if name == "plain":
        return Plain(work)
    if name.isdigit():
        return Cluster(vmfs, work, int(name) + 1, f"replicas-{name}")
    return Peer(peers, name)


def bring_up(target, undo):
    undo.append(target.down)
    start = time.monotonic()
    target.up()
    return time.monotonic() - start
