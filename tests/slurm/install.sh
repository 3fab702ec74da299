#!/bin/bash
# Installs what tests/slurm/ needs on Debian or Ubuntu: SLURM's daemons and commands (8 packages), as root or with sudo.
# The daemons are not started: the tests start their own. `install.sh accounting` adds slurmdbd and a database (24 more).
set -euo pipefail
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
command -v apt-get >/dev/null || { echo "no apt-get here: install slurmctld, slurmd, sbatch and munge by hand" >&2; exit 1; }
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then # exit code 101 keeps package scripts from starting services
    printf '#!/bin/sh\nexit 101\n' | root tee $policy >/dev/null
    root chmod +x $policy
    trap 'root rm -f $policy' EXIT
fi
packages=(slurmctld slurmd slurm-client munge iproute2 procps)
[ "${1:-}" != accounting ] || packages+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server)
install() { root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; }
install || { root apt-get update -qq && install; }
