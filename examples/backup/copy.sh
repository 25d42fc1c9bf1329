#!/usr/bin/env bash
# Copies images of this host's mount to a directory, sparse, and replaces the previous copy only when the
# new one is complete and on stable storage. Best run on a host that holds only replicas.
#
#   copy.sh DIRECTORY IMAGE...      (paths inside the mount)
#
# cp opens the image once, and one open pins one moment of its history (see restic.sh): what is copied is
# what a disk shows after a power cut. VMFS checks every block that is read. Needs jq.
set -euo pipefail
[ $# -gt 1 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }

target=$1
shift
mount=$(vmfs status --json | jq -r .mount)
for image in "$@"; do
    vmfs wait "$image" --in-sync --timeout 600
    mkdir -p "$target/$(dirname "$image")"
    new=$target/$image.new
    trap 'rm -f "$new"' EXIT
    cp --sparse=always "$mount/$image" "$new"
    sync "$new"
    mv "$new" "$target/$image"
    trap - EXIT
    echo "$image: $(stat -c %s "$target/$image") bytes"
done
