#!/usr/bin/env bash
# Several processes of one program on this machine, on virtual CPU devices that talk over the loopback interface:
# what a multi-host run does, without the hosts. See --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Runs one training in several processes on this machine's CPU.

  launch/local.sh --processes=2 --devices=2 -- --config=configs/tokenizer.py:size=test --workdir=runs/two

  --processes=N   how many processes (default 2)
  --devices=M     virtual CPU devices of each process (default 1)
  --binary=NAME   train (default), encode or evaluate: the module imagegpt_jax.NAME
  --dry_run       print the commands, run none
  -- ARGS         arguments of the program

Lines of process 0 are shown as they are, those of the others after "[number] ". When a process fails, the others end
too, and the exit status is that of the first that failed. A signal ends all: the status is 75 if they saved, else 130.
PYTHON chooses the interpreter (default: .venv/bin/python, or else python3).
EOF
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2 devices=1 binary=train dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --binary=*) binary=${1#*=} ;;
    --dry_run) dry_run=true ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument '$1': arguments of the program come after --. See --help." ;;
  esac
  shift
done
count processes "$processes"
count devices "$devices"
known_binary "$binary"
something_to_run "$binary" "$@"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ ! -x "$(command -v "$python")" ]; then
  [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no program: give the path of a Python interpreter, or unset it."
  python=python3
fi

if $dry_run; then
  port=PORT
else
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# The environment of process $1, one NAME=value a line.
environment() {
  echo "JAX_PLATFORMS=cpu"
  echo "JAX_NUM_CPU_DEVICES=$devices"
  echo "JAX_NUM_PROCESSES=$processes"
  echo "JAX_PROCESS_ID=$1"
  echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
  echo "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port" # out of reach of other machines
}

if $dry_run; then
  for ((i = 0; i < processes; i++)); do
    # shellcheck disable=SC2046 # none of the values has a space
    quote env $(environment "$i") "$python" -m "imagegpt_jax.$binary" "$@"
  done
  exit 0
fi

# Passes lines on: as they are for process 0, else after its number. The lines in which gloo, the library of the
# collectives, reports who is connected are left out. A signal to all processes ends the filters only with their input.
show() {
  trap '' INT TERM HUP
  if [ "$1" = 0 ]; then
    grep --line-buffered --invert-match '^\[Gloo\]\|^[0-9]* is connected to\|peer ranks' || true
  else
    grep --line-buffered --invert-match '^\[Gloo\]\|^[0-9]* is connected to\|peer ranks' | sed -u "s/^/[$1] /" || true
  fi
}

pids=()
stop_all() {
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
}

# Seconds that processes get to end by themselves when one has failed, before they are killed.
patience=20
stopped=
trap 'stopped=130; stop_all TERM' INT TERM HUP

for ((i = 0; i < processes; i++)); do
  # shellcheck disable=SC2046
  if [ "$i" = 0 ]; then
    # Its progress bar needs the terminal, if there is one.
    env $(environment "$i") "$python" -m "imagegpt_jax.$binary" "$@" > >(show "$i") &
  else
    env $(environment "$i") "$python" -m "imagegpt_jax.$binary" "$@" > >(show "$i") 2> >(show "$i" >&2) &
  fi
  pids+=($!)
done

# The shell itself is silent from here on: it would report each process that a signal ends, with the whole command.
exec 3>&2 2>/dev/null

# Waits for all; at the first failure the others have `patience` to end.
status=0 running=("${!pids[@]}") deadline=
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[$i]}" 2>/dev/null; then
      left+=("$i")
      continue
    fi
    code=0
    wait "${pids[$i]}" || code=$?
    if [ "$code" != 0 ] && [ "$status" = 0 ]; then
      status=$code deadline=$((SECONDS + patience))
      [ "$code" -lt 128 ] || [ -n "$stopped" ] || echo "error: process $i ended by signal $((code - 128))." >&3
    fi
  done
  running=(${left[@]+"${left[@]}"})
  [ -z "$stopped" ] || [ -n "$deadline" ] || deadline=$((SECONDS + patience))
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    stop_all KILL
  fi
  [ ${#running[@]} = 0 ] || sleep 0.2 || true
done
[ "$status" = 75 ] || status=${stopped:-$status}
exit "$status"
