# shellcheck shell=bash
# What a node does after its own kind of start, the same on both lanes. The start has put the node's files below /etc
# (lib/cluster.sh: seed) and has mounted /run, /var/lib/{kubelet,containerd} and the cgroup file systems.

# shellcheck source=/dev/null
. /etc/lab/env   # NODE K NODES NET POD SVC POOL CNI BIN LOGS
export PATH=$BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
NODE_IP=$NET.$((10 + K))

# keep NAME COMMAND...: started again when it ends, as by an init system
keep() {
  local name=$1
  shift
  while :; do
    "$@" >> "$LOGS/$name.log" 2>&1
    echo "--- $name ended with $?, starts again" >> "$LOGS/$name.log"
    sleep 1
  done &
}

until_ok() { until "$@" > /dev/null 2>&1; do sleep 0.05; done; }

# render TEMPLATE: with this node's values
render() {
  sed -e "s#@NODE@#$NODE#g; s#@POD@#$POD#g; s#@SVC@#$SVC#g; s#@POD_CIDR@#$POD.$K.0/24#g; s#@BIN@#$BIN#g" "/etc/lab/$1"
}

node_identity() {
  hostname "$NODE"
  echo "$NODE" > /etc/hostname
  printf '127.0.0.1 localhost\n%s %s\n' "$NODE_IP" "$NODE" > /etc/hosts
  : > /etc/resolv.conf
  printf '%032x\n' "$((0x0a590000 + K))" > /etc/machine-id
}

node_network() {
  local other
  ip link set lo up
  until_ok ip link show eth0
  ip addr add "$NODE_IP/24" dev eth0
  ip link set eth0 up
  ip route add default via "$NET.1"
  for other in $(seq "$NODES"); do
    [ "$CNI" = none ] || [ "$other" = "$K" ] || ip route add "$POD.$other.0/24" via "$NET.$((10 + other))"
  done
  echo 1 > /proc/sys/net/ipv4/ip_forward
  echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables || true   # is there once br_netfilter is
  # Own files in a real folder: whatever installs a CNI plugin of its own writes here.
  mkdir -p /opt/cni/bin /etc/cni/net.d
  if [ "$CNI" = none ]; then
    cp "$BIN/cni/loopback" /opt/cni/bin/   # the runtime's own
    return
  fi
  cp "$BIN"/cni/* /opt/cni/bin/
  render cni.conflist > /etc/cni/net.d/10-lab.conflist
}

node_containerd() {
  mkdir -p /etc/containerd
  render containerd.toml > /etc/containerd/config.toml
  keep containerd containerd -c /etc/containerd/config.toml
  until_ok ctr version
}

# node_import TARS...: images that this node does not have yet
node_import() {
  local tar stamp
  mkdir -p /var/lib/containerd/imported
  for tar; do
    stamp=/var/lib/containerd/imported/$(stat -c '%n %s %Y' "$tar" | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && continue
    ctr -n k8s.io images import "$tar" >> "$LOGS/import.log" 2>&1 && touch "$stamp"
  done
}

node_kubelet() {
  mkdir -p /run/lab
  render kubelet.yaml > /run/lab/kubelet.yaml
  render kube-proxy.yaml > /run/lab/kube-proxy.yaml
  keep kubelet kube kubelet --config=/run/lab/kubelet.yaml --kubeconfig=/etc/kubernetes/kubelet.kubeconfig \
    --hostname-override="$NODE" --node-ip="$NODE_IP" --root-dir=/var/lib/kubelet --housekeeping-interval=1m \
    --node-labels="topology.kubernetes.io/zone=zone$K,node.kubernetes.io/instance-type=$1"
  keep kube-proxy kube kube-proxy --config=/run/lab/kube-proxy.yaml
}

# reap: pid 1's last duty
reap() { while :; do wait -n || true; sleep 0.2; done; }
