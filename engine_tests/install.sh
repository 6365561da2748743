#!/bin/sh
# Installs what `tox run -e fedml-engines` needs and pip cannot bring into its environment:
#   Open MPI and mosquitto, from Debian's packages (asks for root's rights where they are missing);
#   moto, the S3-compatible store, in an environment of its own, build/moto: its dependencies
#   disagree with FedML's.
# What is there already is left alone. Another python: PYTHON=python3.12 engine_tests/install.sh
set -eu
cd "$(dirname "$0")/.."

has() { PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null; }

packages=""
has mpirun || packages="$packages openmpi-bin"
has mosquitto || packages="$packages mosquitto"
if [ -n "$packages" ]; then
    if ! has apt-get; then
        echo "install.sh: no apt-get here: install the programs of$packages in your system's way" >&2
        exit 1
    fi
    root=""
    [ "$(id -u)" = 0 ] || root=sudo
    $root apt-get update
    # shellcheck disable=SC2086 # one word a package
    $root apt-get install -y $packages
fi

if [ ! -x build/moto/bin/moto_server ]; then
    "${PYTHON:-python3.11}" -m venv build/moto
    build/moto/bin/python -m pip install -q "moto[s3,server]"
fi
echo "mpirun, mosquitto and build/moto/bin/moto_server are there: tox run -e fedml-engines"
