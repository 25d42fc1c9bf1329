#!/usr/bin/env bash
# Throughput and flush latency with 0, 1, 10 and 50 ms of delay between an owner and its replica, each in a
# network namespace of its own, with a relay between them. As root.
#   benches/delay.sh            prints the table
#   benches/delay.sh --write    also puts it into docs/performance.md
# VMFS_BIN names another binary than this tree's release build.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo run --release --quiet -p integration --bin delay -- "$@"
