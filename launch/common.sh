# shellcheck shell=bash
# What local.sh, tpu_vm.sh and gke.sh share. Read by them, not run. (slurm.sbatch stands alone: SLURM runs a copy of it.)

fail() {
  echo "error: $*" >&2
  exit 2
}

# Words as they could be typed.
quote() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,~-]*) line+=" '${word//\'/\'\\\'\'}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

# Prints a command, and runs it unless this is a dry run.
run() {
  quote "$@"
  # shellcheck disable=SC2154 # of the script that reads this file
  $dry_run || "$@"
}

# Checks that a flag's value is a number from 1: count NAME VALUE.
count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1=$2 is not a number from 1."
}

# The name of the bucket in --mount=NAME or --mount=gs://NAME.
bucket() {
  [[ $1 =~ ^(gs://)?([a-z0-9][a-z0-9_.-]*[a-z0-9])$ ]] ||
    fail "--mount=$1 is no bucket: give its name alone, such as my-data or gs://my-data."
  echo "${BASH_REMATCH[2]}"
}

# Checks --binary.
known_binary() {
  case $1 in
    train | encode | evaluate) ;;
    *) fail "--binary=$1 is none of train, encode and evaluate." ;;
  esac
}

# Checks that there are arguments for a binary: something_to_run BINARY ARGS...
something_to_run() {
  [ $# -gt 1 ] || fail "nothing to run: give the arguments of imagegpt_jax.$1 after --. See --help."
}
