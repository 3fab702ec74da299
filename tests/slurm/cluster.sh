#!/bin/bash
# The inside of a test cluster; tests/slurm/cluster.py starts it as the first process of new namespaces.
#
#   cluster.sh up DIR NODES     network, munged, slurmctld and the nodes; stays, and everything ends with it. Runs every
#                               line that is written to DIR/commands: its rights are more than those who enter have
#   cluster.sh node DIR NUMBER  one node: own network, host name, processes and mounts; stays, the node ends with it
set -euo pipefail
what=$1 dir=$2 number=$3
export SLURM_CONF=$dir/slurm.conf
here=$(readlink -f "${BASH_SOURCE[0]}")

up() {
    ip link set lo up
    ip link add cluster type bridge
    ip addr add 10.213.0.1/24 dev cluster
    ip link set cluster up
    mount -t tmpfs tmpfs /run
    mount --bind "$dir/hosts" /etc/hosts
    hostname controller
    # --force: a key or socket in a folder that others can write to is a warning, not an error
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
        --log-file="$dir/log/munged" --seed-file="$dir/munge/seed" --num-threads=2
    [ ! -e "$dir/slurmdbd.conf" ] || accounting
    slurmctld -i
    for i in $(seq 1 "$number"); do "$here" node "$dir" "$i" & done
    trap : TERM HUP INT
    exec 3<>"$dir/commands"
    while read -r command <&3; do bash -c "$command" & done
}

accounting() {
    local me data=$dir/database
    me=$(id -un)
    mariadb-install-db --no-defaults --user="$me" --datadir="$data" --auth-root-authentication-method=normal \
        --skip-test-db >"$dir/log/mariadb-install" 2>&1
    mariadbd --no-defaults --user="$me" --datadir="$data" --socket="$data/socket" --bind-address=127.0.0.1 \
        --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
        --skip-name-resolve --performance-schema=OFF >"$dir/log/mariadbd" 2>&1 &
    until mariadb --no-defaults -uroot --socket="$data/socket" -e "create database accounting;
        create user 'slurm'@'127.0.0.1' identified by 'slurm'; grant all on accounting.* to 'slurm'@'127.0.0.1';" \
        2>/dev/null; do sleep 0.1; done
    slurmdbd
    until sacctmgr -n -i list cluster >/dev/null 2>&1; do sleep 0.1; done
    sacctmgr -i -Q add cluster test
}

node() {
    ip link del "v$number" 2>/dev/null || true # of its life before
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$here" inside "$dir" "$number" &
    local outer=$! inner=
    until inner=$(pgrep -P "$outer"); do sleep 0.01; done
    echo "$inner" >"$dir/node$number.pid"
    ip link add "v$number" type veth peer name eth0 netns "$inner"
    ip link set "v$number" master cluster up
    wait "$outer" || true
}

inside() {
    hostname "node$number"
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
    ip link set lo up
    ip addr add "10.213.0.$((10 + number))/24" dev eth0
    ip link set eth0 up
    slurmd -N "node$number"
    stay
}

# A first process must collect the children that others leave to it, as bash does while it waits.
stay() {
    trap : TERM HUP INT
    while :; do sleep 3600 & wait $! || true; done
}

"$what"
