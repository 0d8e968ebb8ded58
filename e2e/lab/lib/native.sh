# shellcheck shell=bash
# Lane native: a node is a box on this machine, its pool a zfs-fuse daemon's, on a sparse file.

lane_packages=(nftables netbase zfs-fuse e2fsprogs xfsprogs iproute2 util-linux openssl curl jq iperf3 dnsperf)

lane_prepare() {
  allow_watchers
  "$LAB/lab" build
}
lane_name() { echo "node$1"; }
lane_alive() { box_alive "$1"; }
lane_exec() { node_box_exec "$@"; }
lane_start() { node_box_start "$@"; }
lane_kill() { box_kill "$1"; }
lane_cut() { in_net control-plane ip link set "$1" down; }
lane_mend() { in_net control-plane ip link set "$1" up; }

lane_import() {
  local node tar pids=() pid
  for tar; do realpath -e "$tar" > /dev/null || die "no archive $tar"; done
  for node in $(nodes); do
    lane_alive "$node" || { say "$node is down: not imported there"; continue; }
    (for tar; do
      lane_exec "$node" ctr -n k8s.io images import "$(realpath "$tar")" > /dev/null || die "$node does not import $tar"
    done) &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || die "import failed"; done
}

lane_disk() { echo "$STATE/$1/pool/$POOL.img"; }
lane_logs() { tail -n "${2:-30}" "$STATE/$1"/logs/*.log; }

lane_down() {
  local dir
  for dir in "$STATE"/*/; do [ ! -d "$dir/logs" ] || box_kill "$(basename "$dir")"; done
  rm -rf --one-file-system "$STATE"
}
