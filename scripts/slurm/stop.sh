#!/bin/sh
# Stop what start.sh started.
set -eu
for name in slurmd slurmctld; do
    [ -f "$1/$name.pid" ] && kill "$(cat "$1/$name.pid")" || true
done
