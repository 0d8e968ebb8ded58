# shellcheck shell=bash
# A node that is a box on this machine: all of lane native's, and the one that lane openzfs has for what needs no pool.

node_box_exec() { local node=$1; shift; in_box "$node" env PATH="$(built):$PATH" "$@"; }

node_box_start() {
  local node=$1 k=$2 link=$1
  seed "$node" "$k" "$STATE/$node/seed" "$(built)" "$STATE/$node/logs"
  node_images > "$STATE/$node/images"
  box_start "$node" "$LAB/boot/native-node" "$STATE/$node"
  nsenter -t "$(box_pid control-plane)" -n ip link add "$link" type veth peer name eth0 netns "$(box_pid "$node")"
  in_net control-plane ip link set "$link" master br0 up
  in_net control-plane ip route replace "$(pod_cidr "$k")" via "$(node_ip "$k")"
}

# node_images: archives that every node has from its start: the lab's own, and those in LAB_IMAGES
node_images() {
  local tar
  cat "$KIT/current-images"
  for tar in ${LAB_IMAGES:-}; do realpath -e "$tar"; done
}

# Each node's kubelet, containerd and kube-proxy watch files; many distributions allow a user 128 watchers.
allow_watchers() {
  local watchers=/proc/sys/fs/inotify/max_user_instances
  [ "$(cat "$watchers")" -ge 1024 ] || echo 1024 > "$watchers"
}
