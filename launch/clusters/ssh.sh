#!/usr/bin/env bash
# A Ray cluster on machines that you reach by SSH (with keys, no passwords), of any number.
#   export HOSTS="node0 node1 node2"
#   launch/clusters/ssh.sh start                    Ray on all of them; the first is the head
#   launch/clusters/ssh.sh submit +model=8x7b …     train, with this folder's code; streams the log
#   launch/clusters/ssh.sh status
#   launch/clusters/ssh.sh tunnel                   the dashboard and job server on 127.0.0.1:8265
#   launch/clusters/ssh.sh stop                     stop the jobs, which save, and then Ray
# Every host needs moetrain in an environment at the same path, with GPUs also the experts' kernels
# (`make kernels`), and a folder that all of them see (run.dir=/shared/runs). See docs/cluster.md.
set -euo pipefail

# --- Change these, or set them in the environment. ----------------------------------------------
HOSTS=${HOSTS:?"name the hosts: HOSTS='node0 node1' $0 …"} # as ssh knows them, user@host too
ADDRESSES=${ADDRESSES:-}           # as the hosts know each other, in the same order; empty: look up
VENV=${VENV:-moetrain/.venv}       # moetrain's environment on each host; relative to the home folder
SSH=${SSH:-ssh -o BatchMode=yes}   # with more options: SSH="ssh -p 2222 -i key"
RAY_START=${RAY_START:-}           # more options of `ray start`, such as --num-gpus=8
PORT=${PORT:-6379}                 # the head's; hosts must reach each other on all ports
LOCAL_PORT=${LOCAL_PORT:-8265}     # of the tunnel, on this machine
# ------------------------------------------------------------------------------------------------

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
read -ra hosts <<< "$HOSTS"
read -ra addresses <<< "$ADDRESSES"
read -ra ssh <<< "$SSH"
head=${hosts[0]}

# Runs a script on a host, in moetrain's environment and with Ray's variables. It goes through
# standard input, so that nothing of it shows in a list of processes.
on() {
  local host=$1
  {
    printf 'set -eu\nulimit -n 65536 2> /dev/null || true\n. %q/bin/activate\nset -a\n' "$VENV"
    cat "$here/ray.env"
    printf 'set +a\n%s\n' "$2"
  } | "${ssh[@]}" "$host" bash -s
}

# Runs scripts[i] on hosts[i] for all i at once; names the hosts on which it failed.
scripts=()
at_once() {
  local index pids=() failed=()
  for index in "${!scripts[@]}"; do
    on "${hosts[index]}" "${scripts[index]}" > /dev/null & pids[index]=$!
  done
  for index in "${!pids[@]}"; do
    wait "${pids[index]}" || failed+=("${hosts[index]}")
  done
  [ ${#failed[@]} -eq 0 ] || { echo "failed on: ${failed[*]}" >&2; return 1; }
}

# The address by which the others reach a host: its name as ssh means it, looked up here.
address_of() {
  local name
  name=$("${ssh[@]}" -G "$1" | awk '$1 == "hostname" { print $2 }')
  getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }'
}

start() {
  local index host
  [ -s "$token" ] || (umask 077 && mkdir -p "$(dirname "$token")" \
    && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$token")
  for index in "${!hosts[@]}"; do
    host=${hosts[index]}
    "${ssh[@]}" "$host" 'umask 077 && mkdir -p ~/.ray && cat > ~/.ray/auth_token' < "$token"
    [ -n "${addresses[index]:-}" ] || addresses[index]=$(address_of "$host")
    # < /dev/null: Ray's processes stay, and must not hold on to ssh's input.
    scripts[index]="ray start --address=${addresses[0]}:$PORT \
      --node-ip-address=${addresses[index]} $RAY_START < /dev/null"
  done
  on "$head" "ray start --head --node-ip-address=${addresses[0]} --port=$PORT \
    --dashboard-host=127.0.0.1 --dashboard-port=8265 $RAY_START < /dev/null" > /dev/null
  unset 'scripts[0]'
  at_once
  # The head's account of the nodes is some seconds old.
  on "$head" "for attempt in {1..20}; do
      nodes=\$(ray status 2> /dev/null | grep -c '^ *1 node_' || true)
      [ \"\$nodes\" -lt ${#hosts[@]} ] || break
      sleep 1
    done
    ray status"
}

# Opens the way to the head's job server, which listens on the head's loopback only.
open_tunnel() {
  "${ssh[@]}" -N -o ExitOnForwardFailure=yes -L "127.0.0.1:$LOCAL_PORT:127.0.0.1:8265" "$head" &
  tunnel=$!
  trap 'kill $tunnel 2> /dev/null || true' EXIT
  until (exec 3<> "/dev/tcp/127.0.0.1/$LOCAL_PORT") 2> /dev/null; do
    kill -0 $tunnel || exit 1
    sleep 0.2
  done
}

submit() {
  open_tunnel
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token ray job submit \
    --address "http://127.0.0.1:$LOCAL_PORT" --working-dir "$PWD" -- python -m moetrain "$@"
}

stop() {
  # Jobs first: a run that is asked to stop saves. Then Ray: `ray stop` ends every Ray process of
  # yours on a host.
  on "$head" 'python - << END
from ray.job_submission import JobSubmissionClient
import time

jobs = JobSubmissionClient("http://127.0.0.1:8265")
running = [j.submission_id for j in jobs.list_jobs() if j.submission_id and not j.status.is_terminal()]
for job in running:
    print(f"stopping {job}", flush=True)
    jobs.stop_job(job)
while any(not jobs.get_job_status(job).is_terminal() for job in running):
    time.sleep(1)
END' || echo "no job server on $head" >&2
  local index
  for index in "${!hosts[@]}"; do scripts[index]='ray stop < /dev/null'; done
  at_once
}

case ${1:-} in
  start | stop) "$1" ;;
  submit) shift; submit "$@" ;;
  status) on "$head" 'ray status' ;;
  tunnel) open_tunnel; wait $tunnel ;;
  *) sed -n '2,9p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
