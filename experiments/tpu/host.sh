#!/usr/bin/env bash
# What run.sh does on every host: mount the bucket on ~/runs, and install growjax from growjax.tar.gz
# into ~/venv. The system's Python is too old for it; uv brings a newer one.
set -euo pipefail
bucket=${1:?usage: host.sh BUCKET}
cd ~

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  site=https://packages.cloud.google.com/apt
  curl -fsSL $site/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi
mkdir -p runs
mountpoint -q runs || gcsfuse --implicit-dirs "$bucket" runs

tar xzf growjax.tar.gz
python3 -m pip install -q --user uv
uv=$(python3 -m site --user-base)/bin/uv
"$uv" venv -q --allow-existing --python 3.12 venv
# The versions that compiled every model and layout for these slices
"$uv" pip install -q --python venv/bin/python -c growjax/experiments/tpu/constraints.txt './growjax[train,tpu]'
