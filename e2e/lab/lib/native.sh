# shellcheck shell=bash
# Lane native: a node is a box on this machine, its pool a zfs-fuse daemon's, on a sparse file.

lane_packages=(nftables zfs-fuse e2fsprogs xfsprogs iproute2 util-linux openssl curl jq)

# Each node's kubelet, containerd and kube-proxy watch files; many distributions allow a user 128 watchers.
watchers=fs/inotify/max_user_instances

lane_prepare() {
  [ "$(cat "/proc/sys/$watchers")" -ge 1024 ] || echo 1024 > "/proc/sys/$watchers"
  "$LAB/lab" build
}
lane_bin() { built; }
lane_name() { echo "node$1"; }
lane_alive() { box_alive "$1"; }
lane_exec() { local node=$1; shift; in_box "$node" env PATH="$(built):$PATH" "$@"; }

lane_start() {
  local node=$1 k=$2 link=$1
  seed "$node" "$k" "$STATE/$node/seed" "$(built)" "$STATE/$node/logs"
  lane_images > "$STATE/$node/images"
  box_start "$node" "$LAB/boot/native-node" "$STATE/$node"
  nsenter -t "$(box_pid control-plane)" -n ip link add "$link" type veth peer name eth0 netns "$(box_pid "$node")"
  in_net control-plane ip link set "$link" master br0 up
  in_net control-plane ip route replace "$(pod_cidr "$k")" via "$(node_ip "$k")"
}

# lane_images: archives that every node imports at its start: the lab's own, and those in LAB_IMAGES
lane_images() {
  local tar
  cat "$KIT/current-images"
  for tar in ${LAB_IMAGES:-}; do realpath -e "$tar"; done
}

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

lane_logs() { tail -n "${2:-30}" "$STATE/$1"/logs/*.log; }

lane_down() {
  local dir
  for dir in "$STATE"/*/; do [ ! -d "$dir/logs" ] || box_kill "$(basename "$dir")"; done
  rm -rf --one-file-system "$STATE"
}
