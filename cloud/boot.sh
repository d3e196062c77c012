#!/bin/bash
# What the VM does at every boot: it mounts the disk, fetches the data and the token, and runs the container from its
# last checkpoint. When the run has ended or failed for good, the VM deletes itself. cloud/gce.sh puts this script into
# the VM's metadata.
set -euo pipefail

METADATA=http://metadata.google.internal/computeMetadata/v1
DISK=${DISK:-/mnt/luthier}
DEVICE=${DEVICE:-/dev/disk/by-id/google-luthier}
SECRETS=${SECRETS:-/run/luthier}
MAX_FAILURES=3

metadata() { curl -sf -H "Metadata-Flavor: Google" "$METADATA/$1"; }
attribute() { metadata "instance/attributes/luthier-$1" || true; }
# Calls a Google API with the VM's own short-lived token. curl reads the token from standard input, because every
# process can see a command line.
google() {
    local token
    token=$(metadata instance/service-accounts/default/token | sed 's/.*"access_token":"\([^"]*\)".*/\1/')
    printf 'header = "Authorization: Bearer %s"\n' "$token" | curl -sf --config - "$@"
}

mount_disk() {
    mkdir -p "$DISK"
    mountpoint -q "$DISK" && return
    blkid "$DEVICE" >/dev/null || mkfs.ext4 -q "$DEVICE"
    mount "$DEVICE" "$DISK"
}

fetch_token() { # the Hub's token, from Secret Manager; it is kept in memory, not on the disk
    local secret project
    secret=$(attribute secret)
    mkdir -p "$SECRETS"
    chmod 0700 "$SECRETS"
    : >"$SECRETS/env"
    [ -n "$secret" ] || return 0
    project=$(metadata project/project-id)
    printf 'HF_TOKEN=%s\n' "$(google "https://secretmanager.googleapis.com/v1/projects/$project/secrets/$secret/versions/latest:access" |
        sed -n 's/.*"data": *"\([^"]*\)".*/\1/p' | base64 -d)" >"$SECRETS/env"
}

fetch_data() {
    local data
    data=$(attribute data)
    [ -n "$data" ] || return 0
    docker run --rm -v "$DISK/data:/data" gcr.io/google.com/cloudsdktool/google-cloud-cli:slim \
        gcloud storage rsync --recursive "$data" /data
}

train() {
    local image args gpus=()
    image=$(attribute image)
    args=$(attribute args)
    [ -e "${NVIDIA:-/dev/nvidia0}" ] && gpus=(--gpus all)
    google_registry_login "$image"
    mkdir -p "$DISK/outputs" "$DISK/cache" "$DISK/data"
    chown 10001:0 "$DISK/outputs" "$DISK/cache"
    # shellcheck disable=SC2086 # $args holds several words
    docker run --rm --name luthier "${gpus[@]}" --shm-size 4g --env-file "$SECRETS/env" \
        -v "$DISK/outputs:/srv/outputs" -v "$DISK/cache:/cache" -v "$DISK/data:/data:ro" \
        "$image" $args --resume_from_checkpoint auto &
    container=$!
    trap 'docker kill --signal TERM luthier || true' TERM
    local status=0
    while kill -0 "$container" 2>/dev/null; do
        wait "$container" && status=0 || status=$?
    done
    return "$status"
}

google_registry_login() {
    case $1 in
    *-docker.pkg.dev/*)
        metadata instance/service-accounts/default/token | sed 's/.*"access_token":"\([^"]*\)".*/\1/' |
            docker login -u oauth2accesstoken --password-stdin "https://${1%%/*}" >/dev/null
        ;;
    esac
}

delete_vm() {
    local zone name
    zone=$(metadata instance/zone) # projects/N/zones/Z
    name=$(metadata instance/name)
    google -X DELETE "https://compute.googleapis.com/compute/v1/$zone/instances/$name" >/dev/null || poweroff
}

main() {
    mount_disk
    exec > >(tee -a "$DISK/boot.log") 2>&1 # the VM and its journal may be gone when somebody looks for the cause
    local failures status=0
    failures=$(cat "$DISK/failures" 2>/dev/null || echo 0)
    while [ "$failures" -lt "$MAX_FAILURES" ]; do
        fetch_token && fetch_data && train && status=0 || status=$?
        case $status in
        0)
            echo "the run has ended"
            rm -f "$DISK/failures"
            break
            ;;
        143)
            echo "stopped with a checkpoint: it goes on at the next boot"
            return
            ;;
        *)
            failures=$((failures + 1))
            echo "$failures" >"$DISK/failures"
            echo "failure $failures of $MAX_FAILURES, exit code $status"
            sleep "${PAUSE:-30}"
            ;;
        esac
    done
    delete_vm
}

main
