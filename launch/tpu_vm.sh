#!/usr/bin/env bash
# Cloud TPU VMs: create, set up, run on all workers, logs, stop, delete. See --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on Cloud TPU VMs by gcloud.

  launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=v5litepod-256 [--queued] [--spot] [--slices=2]
  launch/tpu_vm.sh status --name=NAME --zone=ZONE [--queued] [--slices=2]
  launch/tpu_vm.sh setup  --name=NAME --zone=ZONE [--slices=2] [--mount=BUCKET]
  launch/tpu_vm.sh run    --name=NAME --zone=ZONE [--slices=2] -- --config=configs/decoder.py:size=L \
      --workdir=gs://BUCKET/L --config.tokenizer=gs://BUCKET/vq
  launch/tpu_vm.sh logs   --name=NAME --zone=ZONE [--slices=2]
  launch/tpu_vm.sh stop   --name=NAME --zone=ZONE [--slices=2]
  launch/tpu_vm.sh delete --name=NAME --zone=ZONE [--queued] [--slices=2]

  --name=NAME      of the TPU VM, or of the queued resource and its slices
  --zone=ZONE      such as us-central2-b
  --project=ID     default: gcloud's own
  --type=TYPE      accelerator type: v4-128, v5litepod-256, v5p-128, v6e-256
  --version=NAME   runtime version; default: the one for the type
  --queued         wait in the queue of the zone (a queued resource) instead of failing when nothing is free
  --spot           spot capacity: cheaper, and may be taken away; `run` again continues from the newest checkpoint
  --slices=N       so many slices of the type, which train together (always a queued resource)
  --mount=BUCKET   setup: mount the bucket at ~/data, read-only, by gcsfuse, which the image must have
  --binary=NAME    run: train (default), encode or evaluate
  --dry_run        print the commands, run none
EOF
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  create | status | setup | run | logs | stop | delete) action=$1 && shift ;;
  --help | -h) usage && exit 0 ;;
  *) fail "'${1:-}' is none of create, status, setup, run, logs, stop and delete. See --help." ;;
esac

name='' zone='' project='' type='' version='' queued=false spot=false slices=1 mount='' binary=train dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --queued) queued=true ;;
    --spot) spot=true ;;
    --slices=*) slices=${1#*=} ;;
    --mount=*) mount=${1#*=} ;;
    --binary=*) binary=${1#*=} ;;
    --dry_run) dry_run=true ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument '$1'. See --help." ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name is missing: give the name of the TPU VM."
[ -n "$zone" ] || fail "--zone is missing: give the zone, such as us-central2-b."
count slices "$slices"
[ "$action" = run ] || [ $# = 0 ] || fail "'$action' takes no arguments after --."
[ "$slices" = 1 ] || queued=true
known_binary "$binary"
[ -z "$mount" ] || mount=$(bucket "$mount")
$dry_run || command -v gcloud > /dev/null || fail "gcloud is not installed: install the Google Cloud CLI."

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# Slices of a queued resource are called NAME-0, NAME-1, ...
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Runs a shell command on the workers of every slice, of those after one that fails as well; the first failure counts.
on_workers() {
  local node code status=0
  for node in "${nodes[@]}"; do
    code=0
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" "--worker=$1" "--command=$2" || code=$?
    [ "$status" != 0 ] || status=$code
  done
  return "$status"
}

# On a worker: whether the program runs. The number in run.pid may be that of another one by now.
running="grep -qs 'imagegpt_jax[.]' /proc/\$(cat ~/run.pid 2> /dev/null)/cmdline"

runtime() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$1 is of no known generation: give --version as well." ;;
  esac
}

case $action in
  create)
    [ -n "$type" ] || fail "--type is missing: give the accelerator type, such as v5litepod-256."
    [ -n "$version" ] || version=$(runtime "$type")
    options=()
    ! $spot || options+=(--spot)
    if $queued; then
      [ "$slices" = 1 ] && options+=("--node-id=$name") || options+=("--node-count=$slices" "--node-prefix=$name")
      run gcloud compute tpus queued-resources create "$name" "${where[@]}" "--accelerator-type=$type" \
        "--runtime-version=$version" "${options[@]}"
    else
      run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" \
        ${options[@]+"${options[@]}"}
    fi
    ;;
  status)
    if $queued; then
      run gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    else
      run gcloud compute tpus tpu-vm describe "$name" "${where[@]}"
    fi
    ;;
  setup)
    # What is committed here goes to every worker; uv brings a Python that is new enough.
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    folder=${TMPDIR:-/tmp}/imagegpt_jax.XXXXXX
    if ! $dry_run; then
      folder=$(mktemp -d "$folder")
      trap 'rm -r "$folder"' EXIT
    fi
    archive=$folder/imagegpt_jax.tar.gz
    run git -C "$root" archive --prefix=imagegpt_jax/ "--output=$archive" HEAD
    for node in "${nodes[@]}"; do
      run gcloud compute tpus tpu-vm scp "$archive" "$node:imagegpt_jax.tar.gz" "${where[@]}" --worker=all
    done
    on_workers all "tar xzf imagegpt_jax.tar.gz && python3 -m pip install --quiet --user uv \
&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv \
&& ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e './imagegpt_jax[tpu,gcs]'"
    [ -z "$mount" ] || on_workers all "mkdir -p ~/data \
&& (mountpoint -q ~/data || gcsfuse --implicit-dirs -o ro $mount ~/data)"
    ;;
  run)
    something_to_run "$binary" "$@"
    on_workers all "! $running || { echo 'error: already running: stop it first, by launch/tpu_vm.sh stop.' >&2; exit 1; }"
    # Every worker runs the same command, in a session of its own that outlives the connection.
    on_workers all "cd ~/imagegpt_jax && (setsid nohup ~/venv/bin/python -m imagegpt_jax.$binary $(quote "$@") \
> ~/run.log 2>&1 < /dev/null & echo \$! > ~/run.pid)"
    ;;
  logs)
    # Only the first process speaks, and every one that fails.
    nodes=("${nodes[0]}")
    on_workers 0 "tail -n 100 -f ~/run.log"
    ;;
  stop) on_workers all "! $running || kill -TERM -- -\$(cat ~/run.pid)" ;;
  delete)
    if $queued; then
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
esac
