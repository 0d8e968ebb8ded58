# shellcheck shell=bash
# Lane openzfs: a node is an emulated machine (qemu without hardware help: it runs anywhere) with Debian's kernel and OpenZFS in it.
# The control plane is a box on this machine, as in the other lane, and so is one more node, for what needs no pool: the cluster's DNS and
# Portolan's controllers. An emulated processor is a tenth of a real one: it has enough to do with what only a node can.

# shellcheck source=guest.sh
. "$LAB/lib/guest.sh"
MANAGEMENT=10.88.0   # a second network, by which commands get into a guest

control_node=control

lane_packages=(nftables netbase iproute2 util-linux openssl curl jq openssh-client socat)

lane_prepare() {
  allow_watchers
  "$LAB/lab" build
}

# Called by lab build.
lane_build() {
  local archives
  mapfile -t archives < <(node_images)
  mkdir -p "$OZ"
  "$LAB/build/guest" > "$OZ/current-guest.new"
  "$LAB/build/kit" "$(built)" "${archives[@]}" > "$OZ/current-kit.new"
  mv "$OZ/current-guest.new" "$OZ/current-guest"
  mv "$OZ/current-kit.new" "$OZ/current-kit"
}

lane_name() { echo "z$1"; }

guest_pid() { cat "$STATE/$1/qemu.pid" 2> /dev/null; }
# The pid may be another process' by now: ours names its pid file.
lane_alive() {
  local pid
  [ "$1" != $control_node ] || { box_alive "$1"; return; }
  pid=$(guest_pid "$1") && tr '\0' '\n' < "/proc/$pid/cmdline" 2> /dev/null | grep -qxF "$STATE/$1/qemu.pid"
}

network_of() {   # NODE K
  local node=$1
  in_net control-plane ip link show br1 > /dev/null 2>&1 || {
    in_net control-plane ip link add br1 type bridge
    in_net control-plane ip addr add "$MANAGEMENT.1/24" dev br1
    in_net control-plane ip link set br1 up
  }
  in_net control-plane ip link show "$node" > /dev/null 2>&1 || {
    in_net control-plane ip tuntap add "$node" mode tap
    in_net control-plane ip tuntap add "$node-ssh" mode tap
    in_net control-plane ip link set "$node-ssh" master br1 up
  }
  in_net control-plane ip link set "$node" master br0 up
  in_net control-plane ip route replace "$(pod_cidr "$2")" via "$(node_ip "$2")"
}

# Kept until the cluster goes down, so that it does not matter if the cache is rebuilt or emptied meanwhile.
disks_of() {
  local own=$STATE/$1 guest kit
  [ ! -e "$own/pool.img" ] || return 0
  guest=$(cat "$OZ/current-guest")
  kit=$(cat "$OZ/current-kit")
  cp --sparse=always "$guest/root.ext4" "$own/root.img"
  cp --sparse=always "$kit/var.ext4" "$own/var.img"
  ln -f "$kit/kit.ext4" "$own/kit.img"
  cp "$guest"/{vmlinuz,initrd,key} "$own/"
  truncate -s "${LAB_POOL_SIZE:-8G}" "$own/pool.img"
}

lane_start() {
  local node=$1 k=$2 own=$STATE/$1 name disks=()
  [ "$node" != $control_node ] || { POOL='' node_box_start "$node" "$k"; return; }
  mkdir -p "$own/logs"
  network_of "$node" "$k"
  disks_of "$node"
  seed "$node" "$k" "$own/seed" /kit /var/log
  echo "MANAGEMENT=$MANAGEMENT" >> "$own/seed/etc/lab/env"
  install -m755 "$LAB/boot/guest-node" "$own/seed/etc/lab/"
  tar -C "$own/seed" --owner=0 --group=0 -cf "$own/seed.img" .
  # cache=unsafe: what the guest has flushed is in this machine's page cache, and survives the guest's power cut.
  for name in root pool kit var seed; do
    disks+=(-drive "if=none,id=$name,file=$own/$name.img,format=raw,cache=unsafe,discard=unmap$([[ $name != @(kit|seed) ]] || echo ,readonly=on)"
      -device "virtio-blk-pci,drive=$name,serial=$name")
  done
  # Behind the control plane, so that its answers, which the guests wait for, don't wait for the guests. One processor each: emulating
  # two costs more than it gives. The missing CPU features crash Debian's kernel when emulated.
  in_net control-plane nice -n 5 qemu-system-x86_64 -accel tcg,thread=multi,tb-size=512 -M q35 -cpu max,-erms,-fsrm -smp 1 -m "${LAB_GUEST_MEMORY:-2048}" \
    -nodefaults -display none -monitor none -serial "file:$own/logs/console.log" -no-reboot -daemonize -pidfile "$own/qemu.pid" \
    -kernel "$own/vmlinuz" -initrd "$own/initrd" -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr net.ifnames=0" \
    "${disks[@]}" -device virtio-rng-pci \
    -netdev "tap,id=nodes,ifname=$node,script=no,downscript=no" \
    -device "virtio-net-pci,netdev=nodes,romfile=,mac=52:54:00:59:00:$(printf %02x "$k")" \
    -netdev "tap,id=ssh,ifname=$node-ssh,script=no,downscript=no" \
    -device "virtio-net-pci,netdev=ssh,romfile=,mac=52:54:00:58:00:$(printf %02x "$k")"
}

guest_ssh() {   # NODE OPTIONS AND COMMAND...
  local own=$STATE/$1
  shift
  ssh -q -i "$own/key" -S "$own/ssh" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes \
    -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=6 "$@"
}

guest_connect() {   # NODE ADDRESS: one connection for all commands, made from inside the lab's network
  local node=$1
  guest_ssh "$node" -O check "$2" 2> /dev/null && return
  rm -f "$STATE/$node/ssh"
  (export -f guest_ssh; STATE=$STATE in_net control-plane bash -c 'guest_ssh "$@"' _ "$node" -o ControlMaster=yes -o ControlPersist=yes -fN "$2") \
    < /dev/null > /dev/null 2>&1
}

lane_exec() {
  local node=$1 address
  [ "$node" != $control_node ] || { node_box_exec "$@"; return; }
  shift
  lane_alive "$node" || die "$node is off"
  address=root@$MANAGEMENT.$((10 + $(number "$node")))
  eventually 60 guest_connect "$node" "$address" || die "$node does not answer: e2e/lab/lab logs $node"
  guest_ssh "$node" "$address" "PATH=/kit:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $(printf '%q ' "$@")"
}

lane_kill() {
  local node=$1 pid
  [ "$node" != $control_node ] || { box_kill "$node"; return; }
  [ ! -S "$STATE/$node/ssh" ] || guest_ssh "$node" -O exit node 2> /dev/null || true
  rm -f "$STATE/$node/ssh"
  lane_alive "$node" || return 0
  pid=$(guest_pid "$node")
  kill -KILL "$pid"
  eventually 10 test ! -d "/proc/$pid" || die "$node: process $pid does not end"
  rm -f "$STATE/$node/qemu.pid"
}

lane_cut() { in_net control-plane ip link set "$1" down; }
lane_mend() { in_net control-plane ip link set "$1" up; }

lane_import() {
  local node tar
  for tar; do
    [ -e "$tar" ] || die "no archive $tar"
    for node in $(nodes); do
      lane_alive "$node" || { say "$node is off: not imported there"; continue; }
      step "$node imports $(basename "$tar") (LAB_IMAGES at lab up is faster)" import_one "$node" "$tar"
    done
  done
}
import_one() { lane_exec "$1" ctr -n k8s.io images import - < "$2"; }

# What the guest has flushed is in it.
lane_disk() { echo "$STATE/$1/pool.img"; }

lane_logs() {
  if [ "$1" = $control_node ]; then
    tail -n "${2:-30}" "$STATE/$1"/logs/*.log
  elif lane_alive "$1"; then
    lane_exec "$1" sh -c "tail -n ${2:-30} /var/log/*.log"
  else
    tail -n "${2:-30}" "$STATE/$1/logs/console.log"
  fi
}

lane_down() {
  local node
  for node in $(nodes 2> /dev/null); do lane_kill "$node"; done
  box_kill control-plane
  rm -rf --one-file-system "$STATE"
}
