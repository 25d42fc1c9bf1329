#!/usr/bin/env bash
# Takes a VM over to this host after the one it ran on has died: promotes every image of the VM, then
# starts its domain. The domain has to be defined here (examples/libvirt/domain.xml).
#
#   failover.sh [--force] DOMAIN
#
# Without a quorum it stops, with exit code 3, before anything is started. --force is the operator's word
# that the other hosts are gone for good; VMFS then says what may be lost, and so does this script.
# Images that this host owns already stay as they are, so it can be run again after an interruption.
# The daemon is chosen as `vmfs` does: VMFS_SOCKET, or the default. Needs virsh and jq.
set -euo pipefail

usage() { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
die() { echo "failover: $*" >&2; exit 1; }

force=()
[ "${1:-}" != --force ] || { force=(--force); shift; }
[ $# -eq 1 ] || usage
domain=$1

state=$(virsh domstate "$domain") || die "no domain $domain on this host"
[ "$state" = "shut off" ] || die "$domain is $state here already"

status=$(vmfs status --json)
mount=$(jq -r .mount <<<"$status")

# Every disk of the domain that lies in the mount, as a path inside it.
mapfile -t images < <(virsh domblklist --details "$domain" | awk '$1 == "file" && $2 == "disk" {print $4}' |
    while IFS= read -r file; do [[ $file != "$mount"/* ]] || printf '%s\n' "${file#"$mount"/}"; done)
[ ${#images[@]} -gt 0 ] || die "$domain has no disk in $mount"

for image in "${images[@]}"; do
    role=$(jq -r --arg i "$image" '.images[] | select((.path | ltrimstr("/")) == $i) | .role' <<<"$status")
    case $role in
    owner) echo "failover: $image is owned by this host already" ;;
    replica) vmfs promote "$image" "${force[@]}" ;;
    *) die "$image: no copy on this host" ;;
    esac
done
virsh start "$domain"
