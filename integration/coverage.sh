#!/bin/sh
# Which lines of the chain, the state machines and the store run under simulation.
# usage: integration/coverage.sh [RUNS [SEED]]     (300 runs from seed 1 on)
# Prints a table by file, and writes the lines that never ran to target/coverage/missed.txt.
# Needs llvm-profdata and llvm-cov of rustc's LLVM version: rustup's component llvm-tools, or a package.
set -eu
cd "$(dirname "$0")/.."
runs=${1:-300} seed=${2:-1}
crates="vmfs-common/src vmfs-proto/src vmfs-store/src"
dir=$PWD/target/coverage
version=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
tool() {
    for t in "$(rustc --print sysroot)"/lib/rustlib/*/bin/"$1" "$(command -v "$1-$version" || true)"; do
        if [ -x "$t" ]; then echo "$t" && return; fi
    done
    echo "coverage: no $1 of LLVM $version (rustup component add llvm-tools)" >&2
    exit 1
}
profdata=$(tool llvm-profdata) cov=$(tool llvm-cov)

# The crates of this workspace are counted, what they depend on is not.
mkdir -p "$dir"
printf '#!/bin/sh\nexec "$@" -C instrument-coverage\n' > "$dir/rustc"
chmod +x "$dir/rustc"
RUSTC_WORKSPACE_WRAPPER=$dir/rustc CARGO_TARGET_DIR=$dir/target cargo build --profile quick --bin sim
rm -rf "$dir/profiles" && mkdir -p "$dir/profiles"
LLVM_PROFILE_FILE=$dir/profiles/%p-%m.profraw \
    "$dir/target/quick/sim" --seed "$seed" --runs "$runs" --jobs "$(nproc)"
"$profdata" merge -sparse -o "$dir/all.profdata" "$dir"/profiles/*.profraw
rm -r "$dir/profiles"

# One record per file: lines with code, and which of them never ran.
# shellcheck disable=SC2086 # a list of directories
"$cov" export -format=lcov -instr-profile "$dir/all.profdata" "$dir/target/quick/sim" $crates |
    awk -v root="$PWD/" -v missed="$dir/missed.txt" '
        function flush_range() {
            if (from) print file ":" from (to > from ? "-" to : "") > missed
            from = 0
        }
        /^SF:/ { file = substr($0, 4); sub(root, "", file); all = ran = from = 0 }
        /^DA:/ {
            split(substr($0, 4), at, ",")
            all++
            if (at[2] > 0) { ran++; flush_range() } else { if (!from) from = at[1]; to = at[1] }
        }
        /^end_of_record/ {
            flush_range()
            crate = file; sub("/.*", "", crate)
            sum[crate] += all; hit[crate] += ran
            printf "%-40s %5d of %5d lines %5.1f %%\n", file, ran, all, all ? 100 * ran / all : 100 | "sort"
        }
        END {
            close("sort")
            for (c in sum) printf "%-40s %5d of %5d lines %5.1f %%\n", "all of " c, hit[c], sum[c], 100 * hit[c] / sum[c] | "sort"
        }'
echo "lines that never ran: $dir/missed.txt"
