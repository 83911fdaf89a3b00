#!/usr/bin/env bash
# Train plans, as JSON, on a slice of Cloud TPUs, spot machines included: create, install, train on every
# host, start over when preempted, tear down. A run goes on from its last checkpoint in the bucket. What is
# installed is the last commit of this repository.
#
#   BUCKET=my-bucket experiments/tpu/run.sh plan.json             the run is NAME in the bucket
#   BUCKET=my-bucket experiments/tpu/run.sh runs/plans/*.json     a study: runs NAME/FILE, then their comparison
#
# Settings, as environment variables:
#   BUCKET       a bucket with a hierarchical namespace, in the region of the zone (required)
#   NAME         of the machines and of the run or study    (growjax)
#   ZONE         where                                      (us-west4-a)
#   ACCELERATOR  which slice; see docs/tpu.md               (v5litepod-16)
#   RUNTIME      image of its machines                      (v2-alpha-tpuv5-lite)
#   SPOT         0 for machines that are not preempted      (1)
#   SAVE_EVERY   steps between checkpoints                  (500)
#   RETRIES      how often to start over                    (100)
#   POLL         seconds between looks at the queue         (60)
#   KEEP         1 leaves the machines running at the end   (0)
set -euo pipefail

: "${1:?usage: BUCKET=my-bucket experiments/tpu/run.sh plan.json ...}"
bucket=${BUCKET:?BUCKET must name a bucket for checkpoints, without gs://}
for plan in "$@"; do
  # The hosts have growjax, and not what a Python file imports
  [ "${plan##*.}" = json ] || {
    echo "$plan: expected a plan as JSON, which 'growjax plan $plan --out plan.json' writes" >&2
    exit 2
  }
done
name=${NAME:-growjax}
zone=${ZONE:-us-west4-a}
accelerator=${ACCELERATOR:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
save_every=${SAVE_EVERY:-500}
retries=${RETRIES:-100}
poll=${POLL:-60}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)

tpus() { gcloud compute tpus "$@" --zone="$zone" --quiet; }
say() { printf '%s %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

# Of the request, and of the machines that it was given: both know of a preemption, in no fixed order
request() { tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }
machines() { tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null || echo NONE; }

everywhere() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }

remove() {
  if [ "$(request)" != NONE ]; then
    say "removing $name"
    tpus queued-resources delete "$name" --force || say "could not remove $name: look after it by hand"
  fi
}

# shellcheck disable=SC2317,SC2329  # the trap calls it
finish() {
  rm -rf "$work"
  if [ "${KEEP:-0}" = 1 ]; then
    say "$name is still there, and costs money"
  else
    remove
  fi
}
trap finish EXIT

create() {
  local spot=()
  [ "${SPOT:-1}" = 0 ] || spot=(--spot)
  say "asking for $accelerator in $zone"
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
    --runtime-version="$runtime" "${spot[@]}"
}

# Returns once the machines are there; a request that failed or was taken back is made again.
obtain() {
  while true; do
    case "$(request) $(machines)" in
      "ACTIVE READY") return ;;
      NONE*) create ;;
      FAILED* | SUSPEND* | *" PREEMPTED" | *" TERMINATED" | "ACTIVE NONE") remove ;;
    esac
    sleep "$poll"
  done
}

# The disks of new machines are empty, so this is done anew after a preemption.
prepare() {
  # The first connection makes keys, which many at once would do over each other
  tpus tpu-vm ssh "$name" --worker=0 --command=true &&
    tpus tpu-vm scp "$work/growjax.tar.gz" "$work/plans.tar.gz" "$root/experiments/tpu/host.sh" \
      "$name:" --worker=all &&
    everywhere "bash host.sh '$bucket' && tar xzf plans.tar.gz"
}

# One after the other, in the order of their names. One that came to its end ends again at once.
train() {
  local run
  for run in "${runs[@]}"; do
    say "training $run"
    everywhere "venv/bin/growjax train 'plans/${run//\//-}.json' --run 'runs/$run' --hosts \
      --save-every $save_every" || return $?
  done
}

# The journals say whether the plans came to their ends.
finished() {
  local run
  for run in "${runs[@]}"; do
    gcloud storage cat "gs://$bucket/$run/metrics.jsonl" | tail -n 1 | grep -q '"finished": true' || return 1
  done
}

compare() {
  local folders
  folders=$(printf " 'runs/%s'" "${runs[@]}")
  tpus tpu-vm ssh "$name" --worker=0 \
    --command="JAX_PLATFORMS=cpu venv/bin/growjax compare$folders --out 'runs/$name/compare.html'" ||
    say "the runs are finished, and could not be compared; see the output above"
}

git -C "$root" archive --format=tar.gz --prefix=growjax/ -o "$work/growjax.tar.gz" HEAD
mkdir "$work/plans"
runs=()
for plan in "$@"; do
  run=$name
  [ $# = 1 ] || run=$name/$(basename "$plan" .json)
  runs+=("$run")
  cp "$plan" "$work/plans/${run//\//-}.json"
done
tar czf "$work/plans.tar.gz" -C "$work" plans

for ((attempt = 1; attempt <= retries; attempt++)); do
  obtain
  say "attempt $attempt: installing"
  status=1
  if prepare; then
    status=0
    train || status=$?
    if [ "$status" = 0 ] && finished; then
      [ $# = 1 ] || compare
      say "finished; its folder is gs://$bucket/$name"
      exit 0
    fi
  fi
  if [ "$status" = 75 ]; then
    # What growjax exits with once it was asked to stop and has saved
    say "stopped, and saved"
    sleep "$poll"
    continue
  fi
  # A preemption is seen a little later than the connection that it cut
  sleep "$poll"
  if [ "$(request) $(machines)" = "ACTIVE READY" ]; then
    say "it failed on machines that are well, and would fail again; see the output above"
    exit 1
  fi
  say "preempted"
done
say "gave up after $retries attempts"
exit 1
