#!/usr/bin/env bash
# Backs up images of this host's mount with restic, best run on a host that holds only replicas: the VMs
# and their host do not notice.
#
#   RESTIC_REPOSITORY=... RESTIC_PASSWORD_FILE=... restic.sh IMAGE...      (paths inside the mount)
#
# Why this is a good copy although the VM goes on: opening a replica's file pins one moment of its history
# until the file is closed, so restic reads what a disk shows after a power cut, never a mixture. Each image
# is such a moment of its own; for a moment inside the guest's files, freeze them first (virsh domfsfreeze).
# Needs jq.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }

mount=$(vmfs status --json | jq -r .mount)
for image in "$@"; do
    # A replica that lags behind would give an old moment: still a good one, but let it catch up first.
    vmfs wait "$image" --in-sync --timeout 600
done
cd "$mount"
exec restic backup --tag vmfs --one-file-system -- "$@"
