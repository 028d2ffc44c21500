#!/bin/sh
# What the chart puts beside an engine's own vLLM: kvmesh, and of its dependencies those that vLLM's images may lack.
#
#   deploy/docker/site.sh TARGET        as root of the repository, with pip
#
# TARGET/any is for every Python; TARGET/cp311 and the like hold what is compiled, by version. Everything else (msgspec,
# pyzmq, numpy, pydantic, ...) is vLLM's own, in the versions that vLLM wants.
set -eu
target=$1
lock=requirements/lock.txt
pip="${PYTHON:-python3} -m pip --disable-pip-version-check --no-input install --quiet --no-deps --no-compile"

pinned() { grep -i "^$1==" "$lock"; }

$pip --target "$target/any" . "$(pinned redis)"
for version in 3.10 3.11 3.12 3.13; do
  $pip --only-binary=:all: --implementation cp --python-version "$version" \
    --target "$target/cp$(echo "$version" | tr -d .)" "$(pinned xxhash)" "$(pinned zstandard)" "$(pinned hiredis)"
done
