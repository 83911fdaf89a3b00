#!/usr/bin/env bash
# Train a plan, as JSON, on a slice of Cloud TPUs, spot machines included: create, install, train on every
# host, start over when preempted, tear down. The run goes on from its last checkpoint in the bucket. What
# is installed is the last commit of this repository.
#
#   BUCKET=my-bucket experiments/tpu/run.sh plan.json
#
# Settings, as environment variables:
#   BUCKET       a bucket with a hierarchical namespace, in the region of the zone (required)
#   NAME         of the machines and of the run             (growjax)
#   ZONE         where                                      (us-west4-a)
#   ACCELERATOR  which slice; see docs/tpu.md               (v5litepod-16)
#   RUNTIME      image of its machines                      (v2-alpha-tpuv5-lite)
#   SPOT         0 for machines that are not preempted      (1)
#   SAVE_EVERY   steps between checkpoints                  (500)
#   RETRIES      how often to start over                    (100)
#   POLL         seconds between looks at the queue         (60)
#   KEEP         1 leaves the machines running at the end   (0)
set -euo pipefail

plan=${1:?usage: BUCKET=my-bucket experiments/tpu/run.sh plan.json}
bucket=${BUCKET:?BUCKET must name a bucket for checkpoints, without gs://}
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

# shellcheck disable=SC2329  # the trap calls it
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
    tpus tpu-vm scp "$work/growjax.tar.gz" "$work/plan.json" "$root/experiments/tpu/host.sh" \
      "$name:" --worker=all &&
    everywhere "bash host.sh '$bucket'"
}

train() {
  everywhere "venv/bin/growjax train plan.json --run 'runs/$name' --hosts --save-every $save_every"
}

# The journal says whether the plan came to its end.
finished() {
  gcloud storage cat "gs://$bucket/$name/metrics.jsonl" | tail -n 1 | grep -q '"finished": true'
}

git -C "$root" archive --format=tar.gz --prefix=growjax/ -o "$work/growjax.tar.gz" HEAD
cp "$plan" "$work/plan.json"

for ((attempt = 1; attempt <= retries; attempt++)); do
  obtain
  say "attempt $attempt: installing"
  status=1
  if prepare; then
    say "training"
    status=0
    train || status=$?
    if [ "$status" = 0 ] && finished; then
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
