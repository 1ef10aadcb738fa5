#!/bin/sh
# Start a Slurm of one machine, for trying sweeps out. As root, after: apt-get install slurm-wlm munge
#
#     scripts/slurm/start.sh DIR        # DIR: where its state and logs go
#     export SLURM_CONF=DIR/slurm.conf
#     qat-run -m hydra/launcher=slurm hydra.launcher.cpus_per_task=1 bits=4,8
#     scripts/slurm/stop.sh DIR
set -eu
dir=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir/state" "$dir/spool" /run/munge
sed -e "s|HOST|$(hostname -s)|g" -e "s|DIR|$dir|g" -e "s|CPUS|$(nproc)|g" \
    -e "s|MEMORY|$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))|g" "$here/slurm.conf" > "$dir/slurm.conf"
export SLURM_CONF="$dir/slurm.conf"
chown -R munge: /run/munge
pgrep -x munged > /dev/null || runuser -u munge -- munged
slurmctld -f "$SLURM_CONF" -c
slurmd -f "$SLURM_CONF" -c
for _ in $(seq 60); do
    sinfo -h -o %T 2> /dev/null | grep -q idle && exec sinfo
    sleep 0.5
done
echo "slurm did not come up; see $dir/slurmctld.log and $dir/slurmd.log" >&2
exit 1
