# shellcheck shell=bash
# What both lanes share: the control plane (always native), node objects, a node's files.
# A lane gives: lane_packages, lane_prepare, lane_name K, lane_start NODE K, lane_kill NODE, lane_alive NODE, lane_exec NODE CMD..., lane_cut NODE,
# lane_mend NODE, lane_down, lane_logs NODE, lane_disk NODE, lane_import TARS...; and control_node, if it has a node for what needs no pool.

built() { cat "$KIT/current" 2> /dev/null; }
need_up() { box_alive control-plane || die "the cluster $CLUSTER is not up: e2e/lab/lab up"; }
nodes() { cat "$STATE/nodes"; }
workers() { grep -vxF "${control_node:-/}" "$STATE/nodes"; }
need_node() { need_up; grep -qxF "$1" "$STATE/nodes" || die "no node $1; there are: $(nodes | tr '\n' ' ')"; }
number() { grep -nxF "$1" "$STATE/nodes" | cut -d: -f1; }

kubectl() { in_net control-plane "$(built)/kubectl" --kubeconfig="$STATE/admin.kubeconfig" "$@"; }

api_ready() {
  [ "$(in_net control-plane curl -sk --max-time 2 --cert "$STATE/pki/admin.crt" --key "$STATE/pki/admin.key" \
    "https://$NET.1:6443/readyz" 2> /dev/null)" = ok ]
}

# seed NODE K FOLDER BIN LOGS: the files that a node has from its birth
seed() {
  local node=$1 k=$2 etc=$3/etc user
  rm -rf "$3"
  mkdir -p "$etc/kubernetes/pki" "$etc/lab"
  cp "$STATE/pki"/{ca.crt,"$node.crt","$node.key","$node-serving.crt","$node-serving.key",kube-proxy.crt,kube-proxy.key} "$etc/kubernetes/pki/"
  kubeconfig "$node" /etc/kubernetes/pki > "$etc/kubernetes/kubelet.kubeconfig"
  kubeconfig kube-proxy /etc/kubernetes/pki > "$etc/kubernetes/kube-proxy.kubeconfig"
  cp "$LAB/boot/node.sh" "$LAB"/etc/* "$etc/lab/"
  cat > "$etc/lab/env" << K
NODE=$node K=$k NODES=$(wc -l < "$STATE/nodes") NET=$NET POD=$POD SVC=$SVC POOL=$POOL POOL_SIZE=${LAB_POOL_SIZE:-8G} CNI=$(cat "$STATE/cni") BIN=$4 LOGS=$5
K
}

control_plane_start() {
  local user
  # shellcheck disable=SC2046
  pki_make $(nodes)
  for user in admin controllers scheduler; do kubeconfig "$user" > "$STATE/$user.kubeconfig"; done
  box_start control-plane "$LAB/boot/control-plane" "$(built)"
  eventually 10 in_net control-plane ip link show br0 > /dev/null 2>&1 || die "the control plane did not start: $STATE/control-plane/logs"
}

# node_object NODE: kubelet makes it too; whoever comes second changes what the first made.
node_object() {
  local cidr role=node-role.kubernetes.io/control-plane
  cidr=$(pod_cidr "$(number "$1")")
  kubectl create -f - <<< "{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"$1\"}}" > /dev/null 2>&1 || true
  kubectl patch node "$1" -p "{\"spec\": {\"podCIDR\": \"$cidr\", \"podCIDRs\": [\"$cidr\"]}}" > /dev/null
  [ "$1" = "${control_node:-}" ] || return 0
  kubectl label node "$1" "$role=" > /dev/null
  kubectl taint node "$1" --overwrite "$role=:NoSchedule" > /dev/null
}

# renewed NODE SINCE: its kubelet has said after SINCE that it lives. A node that just crashed is still "Ready" for a while.
renewed() {
  local at
  at=$(kubectl -n kube-node-lease get lease "$1" -o 'jsonpath={.spec.renewTime}' 2> /dev/null) && [[ $at > $2 ]]
}
node_is_ready() {
  [ "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2> /dev/null)" = True ]
}

# node_is_known NODE: its kubelet has said how it is. Without a CNI plugin that isn't Ready, until somebody brings one.
node_is_known() { [ -n "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2> /dev/null)" ]; }

# wait_for_node NODE [SINCE]
wait_for_node() {
  local end=$((SECONDS + 600))
  until { [ -z "${2:-}" ] || renewed "$1" "$2"; } && node_is_ready "$1"; do
    lane_alive "$1" || die "$1 died: e2e/lab/lab logs $1"
    ((SECONDS < end)) || die "$1 is not Ready after 600 s: e2e/lab/lab logs $1"
    sleep 0.2
  done
  say "$1 is Ready"
}

now() { date -u +%Y-%m-%dT%H:%M:%S.%6NZ; }

cluster_up() {
  local node k tar
  box_alive control-plane && die "the cluster $CLUSTER is up already"
  for tar in ${LAB_IMAGES:-}; do [ -e "$tar" ] || die "LAB_IMAGES: there is no archive $tar"; done
  [ ! -e "$STATE" ] || lane_down   # what a dead one left
  lane_prepare
  mkdir -p "$STATE"
  echo "${LAB_CNI:-bridge}" > "$STATE/cni"
  { for k in $(seq "$1"); do lane_name "$k"; done; echo "${control_node:-}"; } | sed '/^$/d' > "$STATE/nodes"
  control_plane_start
  say "control plane started"
  for node in $(nodes); do lane_start "$node" "$(number "$node")"; done
  say "nodes started: $(nodes | tr '\n' ' ')"
  eventually 120 api_ready || die "the API does not become ready: $STATE/control-plane/logs/kube-apiserver.log"
  say "API ready"
  for node in $(nodes); do node_object "$node"; done
  sed "s#@BIN@#$(built)#; s#@SELECTOR@#${control_node:+node-role.kubernetes.io/control-plane: \"\"}#" "$LAB/addons/coredns.yaml" | kubectl apply -f - > /dev/null
  if [ "$(cat "$STATE/cni")" = none ]; then
    for node in $(nodes); do eventually 600 node_is_known "$node" || die "$node does not come: e2e/lab/lab logs $node"; done
    say "nodes wait for a CNI plugin"
    return
  fi
  for node in $(nodes); do wait_for_node "$node"; done
  kubectl -n kube-system rollout status deployment/coredns --timeout=600s > /dev/null || die "the cluster's DNS does not start"
  say "cluster DNS runs"
}

cluster_down() {
  [ -e "$STATE" ] || { say "the cluster $CLUSTER is not up"; return; }
  lane_down
  say "the cluster $CLUSTER is down"
}
