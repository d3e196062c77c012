#!/bin/bash
# One spot GPU VM on Compute Engine that trains, survives preemption, and deletes itself.
#
#   cloud/gce.sh up     [--settings FILE] [--dry-run]   build the container image and create the VM; after a
#                                                       preemption, start the VM again
#   cloud/gce.sh logs | ssh | status                    see what the VM does
#   cloud/gce.sh down                                   delete the VM; the disk with the checkpoints stays
#   cloud/gce.sh down --disk                            delete the disk too
#
# --dry-run prints every command and runs none. docs/cloud.md goes from an empty project to a trained model.
set -euo pipefail
cd "$(dirname "$0")/.."

settings=cloud/settings.env
dry=
disk=
command=${1:-}
shift || true
while [ $# -gt 0 ]; do
    case $1 in
    --settings)
        settings=${2:?--settings needs a file}
        shift
        ;;
    --dry-run) dry=yes ;;
    --disk) disk=yes ;;
    *)
        echo "error: unknown option $1: see the first lines of $0" >&2
        exit 2
        ;;
    esac
    shift
done
case $command in up | logs | ssh | status | down) ;; *)
    echo "error: say up, logs, ssh, status or down: see the first lines of $0" >&2
    exit 2
    ;;
esac
[ -f "$settings" ] || {
    echo "error: there is no file $settings: copy cloud/settings.env and edit it" >&2
    exit 2
}
# shellcheck source=/dev/null
. "$(realpath "$settings")"
if [ -z "$dry" ] && [ "$PROJECT" = my-project ]; then
    echo "error: $settings still says PROJECT=my-project: give your own" >&2
    exit 2
fi
[ -n "$dry" ] || command -v gcloud >/dev/null || {
    echo "error: gcloud is not installed: see https://cloud.google.com/sdk/docs/install" >&2
    exit 2
}

region=${ZONE%-*}
image=$region-docker.pkg.dev/$PROJECT/luthier/luthier
account=$NAME-vm@$PROJECT.iam.gserviceaccount.com
here=(--project "$PROJECT" --zone "$ZONE")

run() { # or print, with --dry-run
    if [ -n "$dry" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
# What exists already must not make a second try fail.
exists() { [ -z "$dry" ] && "$@" --format 'value(name)' >/dev/null 2>&1; }

prepare_project() {
    run gcloud services enable --project "$PROJECT" compute.googleapis.com artifactregistry.googleapis.com \
        cloudbuild.googleapis.com secretmanager.googleapis.com
    exists gcloud artifacts repositories describe luthier --project "$PROJECT" --location "$region" ||
        run gcloud artifacts repositories create luthier --project "$PROJECT" --location "$region" \
            --repository-format docker
    run gcloud builds submit --project "$PROJECT" --tag "$image" --machine-type e2-highcpu-8 --timeout 3600 .
    # The rights of the VM: pull the image, write logs, read its data and its secret, and delete itself.
    exists gcloud iam service-accounts describe "$account" --project "$PROJECT" ||
        run gcloud iam service-accounts create "$NAME-vm" --project "$PROJECT"
    run gcloud artifacts repositories add-iam-policy-binding luthier --project "$PROJECT" --location "$region" \
        --member "serviceAccount:$account" --role roles/artifactregistry.reader
    [ -z "$SECRET" ] || run gcloud secrets add-iam-policy-binding "$SECRET" --project "$PROJECT" \
        --member "serviceAccount:$account" --role roles/secretmanager.secretAccessor
    [ -z "$DATA" ] || run gcloud storage buckets add-iam-policy-binding "gs://$(cut -d/ -f3 <<<"$DATA")" \
        --member "serviceAccount:$account" --role roles/storage.objectViewer
    exists gcloud iam roles describe luthierDeleteSelf --project "$PROJECT" ||
        run gcloud iam roles create luthierDeleteSelf --project "$PROJECT" --permissions compute.instances.delete
}

up() {
    if exists gcloud compute instances describe "$NAME" "${here[@]}"; then
        run gcloud compute instances start "$NAME" "${here[@]}"
        return
    fi
    prepare_project
    exists gcloud compute disks describe "$NAME-data" "${here[@]}" ||
        run gcloud compute disks create "$NAME-data" "${here[@]}" --size "${DISK_GB}GB" --type pd-balanced
    local gpu=()
    [ -z "$GPU" ] || gpu=(--accelerator "$GPU")
    # Preemption stops the VM, and `up` starts it again. After MAX_HOURS the VM is stopped too, whatever it does.
    run gcloud compute instances create "$NAME" "${here[@]}" --machine-type "$MACHINE" "${gpu[@]}" \
        --provisioning-model SPOT --instance-termination-action STOP --maintenance-policy TERMINATE \
        --image-family ubuntu-2404-lts-amd64 --image-project ubuntu-os-cloud --boot-disk-size 50GB \
        --disk "name=$NAME-data,device-name=luthier,auto-delete=no" \
        --service-account "$account" --scopes cloud-platform --max-run-duration "${MAX_HOURS}h" \
        --metadata "luthier-image=$image,luthier-secret=$SECRET,luthier-data=$DATA" \
        --metadata-from-file "user-data=cloud/cloud-init.yaml,luthier-boot=cloud/boot.sh,luthier-args=$(args_file)"
    run gcloud compute instances add-iam-policy-binding "$NAME" "${here[@]}" \
        --member "serviceAccount:$account" --role "projects/$PROJECT/roles/luthierDeleteSelf"
    echo "The run starts in about ten minutes. To watch it: cloud/gce.sh logs. To stop paying now: cloud/gce.sh down"
}

args_file() { # the arguments may contain commas, which --metadata does not accept
    local file=${TMPDIR:-/tmp}/luthier-args-$NAME
    printf '%s' "$ARGS" >"$file"
    printf '%s' "$file"
}

case $command in
up) up ;;
logs) run gcloud compute ssh "$NAME" "${here[@]}" --command 'sudo journalctl --unit luthier --follow --no-hostname' ;;
ssh) run gcloud compute ssh "$NAME" "${here[@]}" ;;
status) run gcloud compute instances list --project "$PROJECT" --filter "name=$NAME" ;;
down)
    run gcloud compute instances delete "$NAME" "${here[@]}" --quiet || true
    [ -z "$disk" ] || run gcloud compute disks delete "$NAME-data" "${here[@]}" --quiet
    ;;
esac
