#!/usr/bin/env bash
# Google Kubernetes Engine: submits a JobSet, shows its logs, deletes it. See --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on a GKE cluster that has the JobSet controller, by kubectl.

  launch/gke.sh submit --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 [--slices=2] \
      -- --config=configs/decoder.py:size=L --workdir=gs://BUCKET/L --config.tokenizer=gs://BUCKET/vq
  launch/gke.sh submit --gpu --name=NAME --image=IMAGE --accelerator=nvidia-h100-80gb --hosts=2 -- ...
  launch/gke.sh status --name=NAME
  launch/gke.sh logs   --name=NAME
  launch/gke.sh delete --name=NAME

  --name=NAME            of the JobSet; to submit one again, even if it has ended, delete it first
  --image=IMAGE          made by launch/Dockerfile, in a registry that the cluster reads
  --accelerator=LABEL    value of the node label cloud.google.com/gke-tpu-accelerator, or gke-accelerator with --gpu
  --topology=AxB[xC]     chips of a slice, as in the node label cloud.google.com/gke-tpu-topology
  --chips=N              chips or GPUs of a host (default: 4, with --gpu 8)
  --hosts=N              hosts; for TPUs it follows from --topology and --chips
  --slices=N             so many slices, which train together (default 1)
  --gpu                  GPU nodes instead of TPU slices
  --restarts=N           starts again so often after a failure, from the newest checkpoint (default 3)
  --service_account=SA   Kubernetes service account that may use the buckets (default: default). TPU slices use the
                         network of their nodes: what reads and writes gs:// there is the node pool's own account
  --mount=BUCKET         mount the bucket at /data, read-only, by the cluster's Cloud Storage FUSE driver
  --namespace=NS         default: kubectl's own
  --binary=NAME          train (default), encode or evaluate
  --dry_run              print the commands and the JobSet, run none
EOF
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  submit | status | logs | delete) action=$1 && shift ;;
  --help | -h) usage && exit 0 ;;
  *) fail "'${1:-}' is none of submit, status, logs and delete. See --help." ;;
esac

name='' image='' accelerator='' topology='' chips='' hosts='' slices=1 gpu=false restarts=3 service_account=default
mount='' namespace='' binary=train dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --gpu) gpu=true ;;
    --restarts=*) restarts=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --mount=*) mount=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --binary=*) binary=${1#*=} ;;
    --dry_run) dry_run=true ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument '$1'. See --help." ;;
  esac
  shift
done
# Pods are called NAME-slice-12-345-abcde, and may have 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name='$name' is no name: give at most 40 lower-case letters, digits and '-', a letter first and no '-' last."
[ "$action" = submit ] || [ $# = 0 ] || fail "'$action' takes no arguments after --."
known_binary "$binary"
[ -z "$mount" ] || mount=$(bucket "$mount")
$dry_run || command -v kubectl > /dev/null || fail "kubectl is not installed: install it, and connect it to the cluster."

kubectl=(kubectl)
[ -z "$namespace" ] || kubectl+=("--namespace=$namespace")

# Text as it stands between the double quotes of YAML.
escape() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n}
  printf '%s\n' "${text//$'\r'/\\r}"
}

# Arguments as an array in YAML. Kubernetes makes $ of $$, and replaces $(NAME).
array() {
  local word line=''
  for word in "$@"; do
    word=${word//\$/\$\$}
    line+=", \"$(escape "$word")\""
  done
  echo "[${line#, }]"
}

# The JobSet, with ${NAME} and the like replaced.
render() {
  local line text key
  while IFS= read -r line; do
    [[ $line != *'# mount' || -n $mount ]] || continue
    line=${line%' # mount'} text=''
    while [[ $line =~ ^([^\$]*)\$\{([A-Z_]+)\}(.*)$ ]]; do
      key=value_${BASH_REMATCH[2]}
      text+=${BASH_REMATCH[1]}${!key} line=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$text$line"
  done < "$1"
}

case $action in
  submit)
    something_to_run "$binary" "$@"
    [ -n "$image" ] || fail "--image is missing: give the container image, see launch/README.md."
    [ -n "$accelerator" ] || fail "--accelerator is missing: give the value of the node label, such as tpu-v5-lite-podslice."
    $gpu && chips=${chips:-8} || chips=${chips:-4}
    count slices "$slices"
    count chips "$chips"
    [[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts=$restarts is not a number from 0."
    template=jobset.yaml
    if $gpu; then
      template=jobset_gpu.yaml
      [[ $hosts =~ ^[1-9][0-9]*$ ]] || fail "--hosts='$hosts' is not a number from 1: say how many GPU nodes."
      [ "$slices" = 1 ] || fail "--slices=$slices is for TPUs: give more --hosts."
      [ -z "$topology" ] || fail "--topology is for TPUs: with --gpu give --hosts."
    else
      [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology='$topology' is none: write it like 16x16 or 4x4x8."
      all=$((${topology//x/*}))
      [ $((all % chips)) = 0 ] || fail "--topology=$topology has $all chips, which do not divide over hosts of $chips."
      [ -z "$hosts" ] || [ "$hosts" = $((all / chips)) ] || fail "--topology=$topology has $((all / chips)) hosts of $chips chips, not $hosts."
      hosts=$((all / chips))
    fi
    # shellcheck disable=SC2034 # read by `render`
    value_NAME=$name value_IMAGE=$(escape "$image") value_ACCELERATOR=$(escape "$accelerator") \
      value_TOPOLOGY=$topology value_CHIPS=$chips value_HOSTS=$hosts value_SLICES=$slices value_RESTARTS=$restarts \
      value_SERVICE_ACCOUNT=$(escape "$service_account") value_BUCKET=$mount \
      value_ARGS=$(array "imagegpt_jax.$binary" "$@")
    jobset=$(render "$(dirname "${BASH_SOURCE[0]}")/gke/$template")
    quote "${kubectl[@]}" create --filename=-
    if $dry_run; then
      echo "$jobset"
    else
      # Where a JobSet of that name has ended, `apply` would find it unchanged, and start nothing.
      "${kubectl[@]}" create --filename=- <<< "$jobset"
    fi
    ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  # The first pod of the first job speaks for all, and every one that fails for itself.
  logs) run "${kubectl[@]}" logs --follow --prefix --tail=100 --max-log-requests=1000 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete) run "${kubectl[@]}" delete jobset "$name" ;;
esac
